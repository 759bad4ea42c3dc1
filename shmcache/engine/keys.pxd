cdef class TuplePacker:
    cdef unsigned char[::1] room
    cdef unsigned long long start, size
    cdef bint pack(self, tuple key) except -1
    cdef bint pack_call(
        self, unsigned long long count, bytes packed, tuple args, tuple tail, long long first) except -1
    cdef bint begin(self, unsigned long long count) noexcept
    cdef bint finish(self) noexcept
    cdef bint add_all(self, tuple parts, long long first) except -1
    cdef Py_ssize_t add(self, unsigned long long at, object part) except -1
    cdef unsigned long long add_integer(self, unsigned long long at, long long number) noexcept
