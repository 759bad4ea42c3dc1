cdef class Wheel:
    cdef unsigned long long[::1] words
    cdef unsigned long long header, log, lists, slots_at, slots
    cdef unsigned long long at(self, unsigned long long slot) noexcept
    cdef unsigned long long list_of(self, unsigned long long level, unsigned long long tick) noexcept
    cdef unsigned long long number_of(self, unsigned long long tick) noexcept
    cdef void on_insert(self, unsigned long long slot) noexcept
    cdef void on_remove(self, unsigned long long slot) noexcept
    cdef unsigned long long next_expired(self, unsigned long long now, unsigned long long budget) noexcept
    cdef unsigned long long next_due(self, unsigned long long now, unsigned long long budget) noexcept
    cdef unsigned long long empty_span(self, unsigned long long hand) noexcept
    cdef unsigned long long scan_current(
        self, unsigned long long now, unsigned long long budget, unsigned long long start) noexcept
