cdef class Table:
    cdef unsigned long long[::1] words
    cdef unsigned long long header, log, buckets, slots_at, slots
    cdef unsigned long long at(self, unsigned long long slot) noexcept
    cdef unsigned long long bucket_of(self, unsigned long long hash) noexcept
    cdef void link(self, unsigned long long slot, unsigned long long hash) noexcept
    cdef bint unlink(self, unsigned long long slot) noexcept
    cdef unsigned long long take_free(self) noexcept
    cdef void give_free(self, unsigned long long slot) noexcept
    cdef void format_free(self) noexcept
