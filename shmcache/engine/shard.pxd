from shmcache.engine.blocks cimport Blocks
from shmcache.engine.eviction cimport Lru
from shmcache.engine.expiry cimport Wheel
from shmcache.engine.lock cimport Lock
from shmcache.engine.membership cimport Member
from shmcache.engine.reader cimport Reader
from shmcache.engine.request cimport Request
from shmcache.engine.table cimport Table
from shmcache.engine.journal cimport Journal

cdef class Shard:
    cdef unsigned long long[::1] words
    cdef readonly unsigned long long number
    cdef unsigned long long header, log, slots_at, slots
    cdef unsigned long long now
    cdef unsigned long long share, max_entries, max_entry, first_header, stride, shards
    cdef readonly unsigned long long secret0, secret1
    cdef dict mutexes
    cdef object inspect_locked
    cdef Table table
    cdef Blocks blocks
    cdef Lru order
    cdef Wheel wheel
    cdef Lock lock
    cdef Member member
    cdef Journal journal
    cdef Reader reader
    cdef unsigned long long at(self, unsigned long long slot) noexcept
    cdef int promote(self, Request request) except -1
    cdef void record_hit_locked(self, Request request) noexcept
    # the section
    cdef int run(self, list[Request] requests, int start, unsigned long long now, unsigned long long timeout_ns) except -1
    cdef int run_locked(self, list[Request] requests, int start, unsigned long long now) noexcept
    cdef int run_one(self, Request request, unsigned long long now, unsigned long long timeout_ns) except -1
    cdef int enter(self, unsigned long long timeout_ns) except -1
    cdef int leave(self) except -1
    cdef object mutex(self)
    cdef list inspect(self, bint rebuild, unsigned long long now, unsigned long long timeout_ns)
    # operations
    cdef int perform_locked(self, Request request, unsigned long long now) noexcept
    cdef unsigned long long find_locked(self, Request request) noexcept
    cdef int put_locked(self, Request request, unsigned long long found, unsigned long long now) noexcept
    cdef void write_entry(self, Request request) noexcept
    cdef int insert_locked(self, Request request) noexcept
    cdef int overwrite_locked(self, Request request, unsigned long long slot) noexcept
    cdef int touch_locked(self, Request request, unsigned long long slot) noexcept
    cdef void set_expiry(self, Request request, unsigned long long slot) noexcept
    cdef void fill_slot(self, Request request, unsigned long long slot) noexcept
    cdef int remove_locked(self, unsigned long long slot) noexcept
    cdef unsigned long long evict_locked(self, unsigned long long now) noexcept
    cdef int expire_locked(self, unsigned long long now, unsigned long long budget) noexcept
    cdef int purge_locked(self, Request request, unsigned long long now) noexcept
    cdef int incr_locked(self, Request request, unsigned long long found, unsigned long long now) noexcept
    cdef int number_locked(self, Request request, unsigned long long slot) noexcept
    cdef bint is_full_locked(self) noexcept
    cdef void count_locked(self, unsigned long long field) noexcept
    cdef void peak_locked(self) noexcept
    # emptying and recovery
    cdef int clear_locked(self) noexcept
    cdef void format_locked(self) noexcept
    cdef bint is_dirty(self) noexcept
    cdef int recover_locked(self) except -1
