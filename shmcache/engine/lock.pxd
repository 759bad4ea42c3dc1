from shmcache.engine.membership cimport Member

cdef class Lock:
    cdef unsigned long long[::1] words
    cdef unsigned long long header, waited_for
    cdef Member member
    cdef object sleeper, guard
    cdef str why_refused(self)
    cdef bint try_acquire(self) noexcept
    cdef bint acquire(self, unsigned long long timeout_ns) except? -1
    cdef int release(self) except -1
    cdef bint wait(self, unsigned long long timeout_ns) except? -1
    cdef int wake(self) except -1
    cdef bint add_waiters(self, int by) noexcept
