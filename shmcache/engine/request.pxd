from shmcache.engine.keys cimport TuplePacker
from shmcache.engine.message cimport Message

cdef class Request(Message):
    cdef TuplePacker packer
    cdef int op, status
    cdef object key_object, body_object
    cdef unsigned char* key
    cdef unsigned char* body
    cdef unsigned long long key_size, key_kind, hash
    cdef object small_memory, scratch_memory, whole
    cdef unsigned char[::1] small
    cdef unsigned long long head_size, body_size, value_size, room, skip
    cdef unsigned long long expiry, version, slot, now
    cdef int refusals
    cdef unsigned long long given_up
    cdef long long number, initial
    cdef bint in_use, is_whole, keep_expiry, has_initial, wants_value
    cdef int make_room(self) except -1
    cdef void release(self)
    cdef int set_key(self, object key) except -1
    cdef TuplePacker own_packer(self)
    cdef void set_packed_key(self)
    cdef int set_wide_key(self, str key) except -1
    cdef object found_key(self)
    cdef int set_value(self, object value, object codec) except -1
    cdef int set_text(self, str value) except -1
    cdef int set_bytes(self, bytes value) except -1
    cdef void set_integer(self, long long value)
    cdef object large_value(self, object codec)
    cdef object value(self, object codec)
