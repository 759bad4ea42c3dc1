from shmcache.engine.request cimport Request
from shmcache.engine.store cimport Store

cdef class Memo:
    cdef dict __dict__
    cdef object __weakref__
    cdef object _get, _set, _ttl, _function, _bind, _explain
    cdef Store _store
    cdef bytes _packed
    cdef tuple _prefix, _tail
    cdef long long _required, _most
    cdef public unsigned long long hits, misses
    cpdef object find(self, tuple args, dict kwargs)
    cpdef tuple key(self, tuple args, dict kwargs)
    cpdef object look_up(self, tuple entry, tuple args, dict kwargs)
