cdef class Journal:
    cdef unsigned long long[::1] words
    cdef unsigned long long header, log, slots_at, slots, bins, end
    cdef unsigned long long at(self, unsigned long long slot) noexcept
    cdef void begin(self, unsigned long long slot) noexcept
    cdef void commit(self, unsigned long long slot) noexcept
    cdef void commit_order(self) noexcept
    cdef void add(self, unsigned long long field, unsigned long long by) noexcept
    cdef void roll_back(self) noexcept
    cdef bint is_logged(self, unsigned long long word) noexcept
