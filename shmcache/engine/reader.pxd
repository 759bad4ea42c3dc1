from shmcache.engine.blocks cimport Blocks
from shmcache.engine.membership cimport Member
from shmcache.engine.request cimport Request
from shmcache.engine.table cimport Table

cdef class Reader:
    cdef unsigned long long[::1] words
    cdef unsigned char[::1] data
    cdef unsigned long long header, slots_at, slots, max_entry
    cdef Table table
    cdef Blocks blocks
    cdef Member member
    cdef unsigned long long at(self, unsigned long long slot) noexcept
    cdef int read(self, Request request, unsigned long long now) except -1
    cdef int read_again(self, Request request, unsigned long long now, int status) except -1
    cdef int read_once(self, Request request, unsigned long long now) noexcept
    cdef int copy_value(self, Request request, unsigned long long run, unsigned long long at) noexcept
    cdef int copy_whole(self, Request request, unsigned long long run, unsigned long long at) noexcept
    cdef int read_slot(self, Request request, unsigned long long slot, unsigned long long now) noexcept
