cdef class Lru:
    cdef unsigned long long[::1] words
    cdef unsigned long long header, log, slots_at, slots, limit
    cdef unsigned long long at(self, unsigned long long slot) noexcept
    cdef void on_insert(self, unsigned long long slot) noexcept
    cdef bint is_stale(self, unsigned long long slot) noexcept
    cdef void on_hit(self, unsigned long long slot) noexcept
    cdef void on_remove(self, unsigned long long slot) noexcept
    cdef unsigned long long victim(self) noexcept
    cdef void tick(self) noexcept
    cdef void link_front(self, unsigned long long slot) noexcept
    cdef void unlink(self, unsigned long long slot) noexcept
