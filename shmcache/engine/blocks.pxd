cdef class Blocks:
    cdef unsigned long long[::1] words
    cdef unsigned char[::1] data
    cdef unsigned long long header, log, bins, first, count
    cdef unsigned long long reserved
    cdef unsigned long long at(self, unsigned long long block) noexcept
    cdef unsigned long long place_of(self, unsigned long long run, unsigned long long size) noexcept
    cdef unsigned long long bytes_at(self, unsigned long long run) noexcept
    cdef unsigned long long length(self, unsigned long long run) noexcept
    cdef unsigned long long used_length(self, unsigned long long run) noexcept
    cdef unsigned long long free_length(self, unsigned long long run) noexcept
    cdef bint is_marked_free(self, unsigned long long run) noexcept
    cdef bint holds(self, unsigned long long run, unsigned long long size) noexcept
    cdef bint reserve(self, unsigned long long size) noexcept
    cdef bint has_spare(self, unsigned long long length) noexcept
    cdef void settle(self) noexcept
    cdef void drain(self) noexcept
    cdef void write(
        self, unsigned long long run, unsigned long long skip, unsigned char* source,
        unsigned long long size) noexcept
    cdef bint read(
        self, unsigned long long run, unsigned long long skip, object target, unsigned long long to,
        unsigned long long size) noexcept
    cdef bint matches(self, unsigned long long run, unsigned char* other, unsigned long long size) noexcept
    cdef unsigned long long find(self, unsigned long long length) noexcept
    cdef void take(self, unsigned long long run, unsigned long long length) noexcept
    cdef void release(self, unsigned long long run) noexcept
    cdef void link(self, unsigned long long run, unsigned long long length) noexcept
    cdef void unlink(self, unsigned long long run) noexcept
    cdef void mark_after(self, unsigned long long run, unsigned long long length, bint free) noexcept
    cdef unsigned long long bin_of(self, unsigned long long length) noexcept
    cdef unsigned long long fitting_bin(self, unsigned long long length) noexcept
    cdef unsigned long long used_bin(self, unsigned long long lowest) noexcept
    cdef void format_free(self) noexcept
