from shmcache.engine.membership cimport Member
from shmcache.engine.request cimport Request
from shmcache.engine.shard cimport Shard

cdef class Store:
    cdef public object attachment
    cdef readonly object clock
    cdef object encode_value, decode_value
    cdef list[Shard] shards
    cdef unsigned long long shard_count, max_entry
    cdef unsigned long long epoch, next_check
    cdef readonly unsigned long long default_ttl_ns
    cdef unsigned long long timeout_ns
    cdef Member member
    cdef Request spare
    cdef unsigned long long now(self) except? 0
    cdef Request take(self)
    cdef void give(self, Request request)
    cdef unsigned long long read_clock(self) except? 0
    cdef list[Shard] here(self)
    cdef int set_ttl(self, Request request, object ttl, unsigned long long now) except -1
    cdef int find(self, Request request, object key, bint wants_value) except -1
    cdef int change(self, Request request, int op, unsigned long long now) except -1
    cdef int read_locked(self, Request request, Shard shard, int op, unsigned long long now) except -1
    cdef int make_way(self, Request request, list[Shard] shards, unsigned long long now) except -1
    cdef void count(self, Request request)
    cdef object failure(self, int status)
    cdef int raise_for(self, int status) except -1
    cdef int put(self, int op, object key, object value, object ttl, unsigned long long version) except -1
    cdef int set_step(self, Request request, object delta, object initial) except -1
