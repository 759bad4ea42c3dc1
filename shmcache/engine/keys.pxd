cdef class TuplePacker:
    cdef unsigned char[::1] room
    cdef unsigned long long start, size
    cdef bint pack(self, tuple key) except -1
    cdef int add(self, unsigned long long at, object part) except -1
    cdef void add_integer(self, unsigned long long at, long long number)
