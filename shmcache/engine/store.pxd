from shmcache.engine.membership cimport Member
from shmcache.engine.request cimport Request
from shmcache.engine.shard cimport Shard

cdef class Store:
    cdef public object _attachment
    cdef readonly object _clock
    cdef object _codec
    cdef list[Shard] _shards
    cdef unsigned long long _shard_count, _max_entry
    cdef unsigned long long _epoch, _next_check
    cdef readonly unsigned long long _default_ttl_ns
    cdef unsigned long long _timeout_ns
    cdef Member _member
    cdef Request _spare
    cdef unsigned long long _now(self) except? 0
    cdef Request _take(self)
    cdef void _give(self, Request request)
    cdef unsigned long long _read_clock(self) except? 0
    cdef list[Shard] _here(self)
    cdef int _set_ttl(self, Request request, object ttl, unsigned long long now) except -1
    cdef int _find(self, Request request, bint wants_value) except -1
    cdef int _change(self, Request request, int op, unsigned long long now) except -1
    cdef int _read_locked(self, Request request, Shard shard, int op, unsigned long long now) except -1
    cdef int _make_way(self, Request request, list[Shard] shards, unsigned long long now) except -1
    cdef void _count(self, Request request)
    cdef object _failure(self, int status)
    cdef int _raise_for(self, int status) except -1
    cdef int _put(self, int op, object key, object value, object ttl, unsigned long long version) except -1
    cdef int _set_step(self, Request request, object delta, object initial) except -1
