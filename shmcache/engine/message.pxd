cdef list known_keys

cdef class Message:
    cdef unsigned char[::1] scratch
    cdef unsigned long long at, end
    cdef object unpack(self, unsigned long long size)
    cdef object next_item(self, unsigned long long depth)
    cdef object next_list(self, unsigned long long count, unsigned long long depth)
    cdef object next_dict(self, unsigned long long count, unsigned long long depth)
    cdef object next_key(self)
    cdef object next_known(self, unsigned long long size)
    cdef object next_text(self, unsigned long long size)
    cdef object next_bytes(self, unsigned long long size)
    cdef unsigned long long next_number(self, unsigned long long width) noexcept
    cdef void give_up(self) noexcept
    cdef object pack(self, object value)
    cdef int put(self, object value, unsigned long long depth) except -1
    cdef int put_dict(self, dict items, unsigned long long depth) except -1
    cdef int put_list(self, list items, unsigned long long depth) except -1
    cdef int put_text(self, str text) except -1
    cdef int put_bytes(self, bytes data) except -1
    cdef int put_body(self, unsigned char* start, unsigned long long size) noexcept
    cdef int put_integer(self, long long value) noexcept
    cdef int put_size(
        self, unsigned long long fixed, unsigned long long below, unsigned long long mark_8,
        unsigned long long mark_16, unsigned long long size) noexcept
    cdef int put_mark(self, unsigned long long mark, unsigned long long number, unsigned long long width) noexcept

cdef Message _packer
