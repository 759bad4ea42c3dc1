from shmcache.engine.shard cimport Shard

cdef class Inspector:
    cdef Shard shard
    cdef unsigned char[::1] claimed, seen
    cdef readonly list problems
    cdef unsigned long long used, timed, used_bytes, claimed_runs
    cdef void check(self)
    cdef void report(self, str problem)
    cdef bint is_sound(self, unsigned long long slot)
    cdef bint claim(self, unsigned long long slot)
    cdef void disclaim(self, unsigned long long slot)
    cdef bint is_unclaimed(self, unsigned long long run, unsigned long long length)
    cdef void mark(self, unsigned long long run, unsigned long long length, bint claimed)
    cdef bint hash_is_right(self, unsigned long long slot)
    cdef void slots(self)
    cdef void buckets(self)
    cdef void free_slots(self)
    cdef void order(self)
    cdef void wheel(self)
    cdef bint is_in_time(self, unsigned long long number, unsigned long long tick)
    cdef void runs(self)
    cdef void bins(self)
    cdef void totals(self)
    cdef bint stamp_is_sound(self)
    cdef void rebuild(self)
    cdef void rebuild_table(self)
    cdef void rebuild_lists(self)
    cdef void set_hand(self)
    cdef void rebuild_runs(self)
    cdef bint has_twin(self, unsigned long long slot) noexcept
    cdef void drop(self, unsigned long long slot, str why)
