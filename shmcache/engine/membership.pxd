cdef class Member:
    cdef unsigned long long[::1] words
    cdef readonly unsigned long long owner, counters
    cdef object registry
    cdef void count(self, unsigned long long counter, unsigned long long by) noexcept
