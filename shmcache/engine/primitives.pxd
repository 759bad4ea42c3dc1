# The C bodies of primitives.py: the few operations that Python cannot express or that must be raw.
# Loads and stores check the index against the view, whatever the caller believes: the contents of the segment are not
# trusted. Outside of it a load gives 0 and a store does nothing; callers see a contradiction and report corruption.

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>
    #include <time.h>
    #include <pthread.h>

    typedef unsigned long long shm_word;
    #define SHM_UNLIKELY(x) __builtin_expect(!!(x), 0)
    #define SHM_BARRIER() __asm__ __volatile__("" ::: "memory")

    #define SHM_NOWHERE (1ULL << 60)
    static inline shm_word shm_record(shm_word first, shm_word size, shm_word number, shm_word count) {
        return number < count ? first + number * size : SHM_NOWHERE;
    }
    static inline shm_word shm_load_at(const shm_word *w, shm_word n, shm_word i, int order) {
        if (SHM_UNLIKELY(i >= n)) return 0;
        return __atomic_load_n(w + i, order);
    }
    static inline void shm_store_at(shm_word *w, shm_word n, shm_word i, shm_word x, int order) {
        if (SHM_UNLIKELY(i >= n)) return;
        SHM_BARRIER();  /* a process may die between any two stores: keep them in the order of the source */
        if (order) __atomic_store_n(w + i, x, __ATOMIC_RELEASE);
        else __atomic_store_n(w + i, x, __ATOMIC_RELAXED);
        SHM_BARRIER();
    }
    #define SHM_LOG_ENTRIES 96  /* LOG_ENTRIES of layout.py */
    static inline void shm_logged_at(shm_word *w, shm_word n, shm_word log, shm_word i, shm_word x) {
        shm_word used, entry;
        if (SHM_UNLIKELY(i >= n || log + 2 * SHM_LOG_ENTRIES >= n)) return;
        used = __atomic_load_n(w + log, __ATOMIC_RELAXED);  /* once: it may be another one when read again */
        if (SHM_UNLIKELY(used >= SHM_LOG_ENTRIES)) return;
        entry = log + 1 + 2 * used;
        w[entry] = i;
        w[entry + 1] = w[i];
        SHM_BARRIER();  /* the entry stands before it counts, and counts before the store it covers */
        __atomic_store_n(w + log, used + 1, __ATOMIC_RELAXED);
        SHM_BARRIER();
        __atomic_store_n(w + i, x, __ATOMIC_RELAXED);
        SHM_BARRIER();
    }
    static inline int shm_cas_at(shm_word *w, shm_word n, shm_word i, shm_word old, shm_word new_) {
        if (SHM_UNLIKELY(i >= n)) return 0;
        return __atomic_compare_exchange_n(w + i, &old, new_, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    }
    static inline void shm_store_seq_cst_at(shm_word *w, shm_word n, shm_word i, shm_word x) {
        if (SHM_UNLIKELY(i >= n)) return;
        __atomic_store_n(w + i, x, __ATOMIC_SEQ_CST);
    }
    static inline void shm_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }
    static inline int shm_bytes_inside(shm_word size, shm_word at, shm_word n) {
        return at <= size && n <= size - at;
    }
    static inline int shm_copy_in_at(unsigned char *d, shm_word size, shm_word at, const unsigned char *from, shm_word n) {
        if (SHM_UNLIKELY(!shm_bytes_inside(size, at, n))) return 0;
        if (n) memcpy(d + at, from, n);  /* of nothing, `from` may be NULL */
        return 1;
    }
    static inline int shm_copy_at(unsigned char *d, shm_word dsize, shm_word dat,
                                  const unsigned char *s, shm_word ssize, shm_word sat, shm_word n) {
        if (SHM_UNLIKELY(!shm_bytes_inside(dsize, dat, n) || !shm_bytes_inside(ssize, sat, n))) return 0;
        memmove(d + dat, s + sat, n);
        return 1;
    }
    static inline void shm_prefetch_at(const unsigned char *d, shm_word size, shm_word at, shm_word n) {
        shm_word end;
        if (SHM_UNLIKELY(!shm_bytes_inside(size, at, n))) return;
        for (end = at + n; at < end; at += 64) __builtin_prefetch(d + at);
    }
    static inline int shm_same_at(const unsigned char *d, shm_word size, shm_word at, const unsigned char *b, shm_word n) {
        if (SHM_UNLIKELY(!shm_bytes_inside(size, at, n))) return 0;
        return memcmp(d + at, b, n) == 0;
    }

    /* A keyed hash of the folded-multiply family (wyhash, rapidhash), two secret words. */
    static inline shm_word shm_fold(shm_word a, shm_word b) {
        unsigned __int128 p = (unsigned __int128)a * b;
        return (shm_word)p ^ (shm_word)(p >> 64);
    }
    static inline shm_word shm_read8(const unsigned char *p) { shm_word v; memcpy(&v, p, 8); return v; }
    static inline shm_word shm_read4(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return v; }
    static inline shm_word shm_hash(const unsigned char *p, shm_word n, shm_word kind, shm_word s0, shm_word s1) {
        shm_word a, b, seed = s0, left = n;
        while (left > 16) {
            seed = shm_fold(shm_read8(p) ^ s1, shm_read8(p + 8) ^ seed);
            p += 16; left -= 16;
        }
        if (left >= 8) { a = shm_read8(p); b = shm_read8(p + left - 8); }
        else if (left >= 4) { a = shm_read4(p); b = shm_read4(p + left - 4); }
        else if (left > 0) { a = ((shm_word)p[0] << 16) | ((shm_word)p[left >> 1] << 8) | p[left - 1]; b = 0; }
        else { a = 0; b = 0; }
        /* the kind last: xored to the seed, it would cancel with the like difference of a key */
        return shm_fold(s0 ^ (n | kind << 16), shm_fold(a ^ s1, b ^ seed));
    }

    static inline shm_word shm_now_ns(void) {
        struct timespec t;
    #ifdef CLOCK_MONOTONIC_COARSE
        clock_gettime(CLOCK_MONOTONIC_COARSE, &t);  /* 5 ns where the precise clock costs 25; 1 to 4 ms steps */
    #else
        clock_gettime(CLOCK_MONOTONIC, &t);
    #endif
        return (shm_word)t.tv_sec * 1000000000ULL + (shm_word)t.tv_nsec;
    }

    static inline shm_word shm_precise_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (shm_word)t.tv_sec * 1000000000ULL + (shm_word)t.tv_nsec;
    }

    /* One counter for each extension module that includes this: an epoch means something only in its own module. */
    static shm_word shm_forks = 1;
    static void shm_count_fork(void) { shm_forks++; }
    static inline void shm_watch_forks(void) { pthread_atfork(NULL, NULL, shm_count_fork); }
    static inline shm_word shm_process_epoch(void) { return shm_forks; }

    static inline shm_word shm_put_number(unsigned char *d, shm_word size, shm_word at, unsigned char mark,
                                          shm_word v, shm_word n) {
        shm_word i;
        if (SHM_UNLIKELY(!shm_bytes_inside(size, at, n + 1))) return 0;
        d[at] = mark;
        for (i = 0; i < n; i++) d[at + 1 + i] = (unsigned char)(v >> (8 * (n - 1 - i)));
        return n + 1;
    }
    static inline shm_word shm_get_number(const unsigned char *d, shm_word size, shm_word at, shm_word n) {
        shm_word i, v = 0;
        if (SHM_UNLIKELY(!shm_bytes_inside(size, at, n))) return 0;
        if (n == 1) return d[at];
        if (n == 2) return (shm_word)d[at] << 8 | d[at + 1];
        for (i = 0; i < n; i++) v = (v << 8) | d[at + i];
        return v;
    }
    static inline shm_word shm_float_bits(double x) { shm_word v; memcpy(&v, &x, 8); return v; }
    static inline double shm_bits_float(shm_word v) { double x; memcpy(&x, &v, 8); return x; }
    static inline shm_word shm_highest_bit(shm_word v) { return v ? 63 - __builtin_clzll(v) : 0; }
    static inline shm_word shm_lowest_bit(shm_word v) { return v ? __builtin_ctzll(v) : 64; }

    #define SHM_VIEW(v) (shm_word *)(v).data, (shm_word)(v).shape[0]
    #define SHM_BYTES(v) (unsigned char *)(v).data, (shm_word)(v).shape[0]
    #define shm_load(v, i) shm_load_at(SHM_VIEW(v), i, __ATOMIC_RELAXED)
    #define shm_load_acquire(v, i) shm_load_at(SHM_VIEW(v), i, __ATOMIC_ACQUIRE)
    #define shm_load_seq_cst(v, i) shm_load_at(SHM_VIEW(v), i, __ATOMIC_SEQ_CST)
    #define shm_store(v, i, x) shm_store_at(SHM_VIEW(v), i, x, 0)
    #define shm_store_release(v, i, x) shm_store_at(SHM_VIEW(v), i, x, 1)
    #define shm_logged_store(v, l, i, x) shm_logged_at(SHM_VIEW(v), l, i, x)
    #define shm_cas(v, i, o, x, g) shm_cas_at(SHM_VIEW(v), i, o, x)
    #define shm_store_seq_cst(v, i, x) shm_store_seq_cst_at(SHM_VIEW(v), i, x)
    #define shm_fence_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define shm_fence_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    #define shm_size_of(d) (shm_word)(d).shape[0]
    #define shm_copy_in(d, at, from, n) shm_copy_in_at(SHM_BYTES(d), at, from, n)
    #define shm_copy(d, dat, s, sat, n) shm_copy_at(SHM_BYTES(d), dat, SHM_BYTES(s), sat, n)
    #define shm_prefetch(d, at, n) shm_prefetch_at(SHM_BYTES(d), at, n)
    #define shm_same_bytes(d, at, b, n) shm_same_at(SHM_BYTES(d), at, b, n)
    #define shm_write_number(d, at, m, x, n) shm_put_number(SHM_BYTES(d), at, m, x, n)
    #define shm_read_number(d, at, n) shm_get_number(SHM_BYTES(d), at, n)
    #define shm_pointer(d, at, n) ((unsigned char *)(d).data + (at))
    #define shm_advance(p, n) ((p) + (n))
    #define shm_low(w) ((shm_word)(w) & 0xFFFFFFFFULL)
    #define shm_high(w) ((shm_word)(w) >> 32)
    #define shm_pack(high, low) (((shm_word)(high) << 32) | (shm_word)(low))
    #define shm_with_low(w, low) (((shm_word)(w) & 0xFFFFFFFF00000000ULL) | (shm_word)(low))
    #define shm_with_high(w, high) (((shm_word)(w) & 0xFFFFFFFFULL) | ((shm_word)(high) << 32))
    static inline long long shm_signed(shm_word v) { return (long long)v; }
    static inline int shm_add_overflows(long long a, long long b) { long long c; return __builtin_add_overflow(a, b, &c); }
    #define shm_bit(n) (1ULL << (n))
    #define shm_wrap(x) ((shm_word)(x))
    """
    unsigned long long load "shm_load"(unsigned long long[::1] words, unsigned long long index) noexcept
    unsigned long long load_acquire "shm_load_acquire"(unsigned long long[::1] words, unsigned long long index) noexcept
    unsigned long long load_seq_cst "shm_load_seq_cst"(unsigned long long[::1] words, unsigned long long index) noexcept
    void store "shm_store"(unsigned long long[::1] words, unsigned long long index, unsigned long long value) noexcept
    void store_release "shm_store_release"(
        unsigned long long[::1] words, unsigned long long index, unsigned long long value) noexcept
    unsigned long long record "shm_record"(
        unsigned long long first, unsigned long long size, unsigned long long number,
        unsigned long long count) noexcept
    void logged_store "shm_logged_store"(
        unsigned long long[::1] words, unsigned long long log, unsigned long long index,
        unsigned long long value) noexcept
    bint compare_and_swap "shm_cas"(
        unsigned long long[::1] words, unsigned long long index, unsigned long long old, unsigned long long new,
        object guard) noexcept
    void store_seq_cst "shm_store_seq_cst"(
        unsigned long long[::1] words, unsigned long long index, unsigned long long value) noexcept
    void fence_acquire "shm_fence_acquire"() noexcept
    void fence_release "shm_fence_release"() noexcept
    void pause "shm_pause"() noexcept

    unsigned long long size_of "shm_size_of"(unsigned char[::1] data) noexcept
    bint copy_in "shm_copy_in"(
        unsigned char[::1] data, unsigned long long at, unsigned char* source, unsigned long long size) noexcept
    bint copy "shm_copy"(
        unsigned char[::1] target, unsigned long long at, unsigned char[::1] source, unsigned long long start,
        unsigned long long size) noexcept
    void prefetch "shm_prefetch"(
        unsigned char[::1] data, unsigned long long at, unsigned long long size) noexcept
    bint same_bytes "shm_same_bytes"(
        unsigned char[::1] data, unsigned long long at, unsigned char* other, unsigned long long size) noexcept
    unsigned char* pointer "shm_pointer"(
        unsigned char[::1] data, unsigned long long at, unsigned long long size) noexcept
    unsigned char* advance "shm_advance"(unsigned char* start, unsigned long long by) noexcept
    unsigned long long write_number "shm_write_number"(
        unsigned char[::1] data, unsigned long long at, unsigned char mark, unsigned long long value,
        unsigned long long size) noexcept
    unsigned long long read_number "shm_read_number"(
        unsigned char[::1] data, unsigned long long at, unsigned long long size) noexcept
    unsigned long long float_bits "shm_float_bits"(double value) noexcept
    double bits_float "shm_bits_float"(unsigned long long bits) noexcept

    unsigned long long key_hash "shm_hash"(
        unsigned char* key, unsigned long long size, unsigned long long kind, unsigned long long secret0,
        unsigned long long secret1) noexcept
    unsigned long long now_ns "shm_now_ns"() noexcept
    unsigned long long precise_ns "shm_precise_ns"() noexcept
    void watch_forks "shm_watch_forks"() noexcept
    unsigned long long process_epoch "shm_process_epoch"() noexcept

    unsigned long long low "shm_low"(unsigned long long word) noexcept
    unsigned long long high "shm_high"(unsigned long long word) noexcept
    unsigned long long pack "shm_pack"(unsigned long long high, unsigned long long low) noexcept
    unsigned long long with_low "shm_with_low"(unsigned long long word, unsigned long long low) noexcept
    unsigned long long with_high "shm_with_high"(unsigned long long word, unsigned long long high) noexcept
    unsigned long long bit "shm_bit"(unsigned long long position) noexcept
    long long as_signed "shm_signed"(unsigned long long word) noexcept
    bint add_overflows "shm_add_overflows"(long long a, long long b) noexcept
    unsigned long long wrap "shm_wrap"(unsigned long long number) noexcept
    unsigned long long highest_bit "shm_highest_bit"(unsigned long long word) noexcept
    unsigned long long lowest_bit "shm_lowest_bit"(unsigned long long word) noexcept


cdef extern from *:
    """
    static inline unsigned char *shm_utf8(PyObject *text, Py_ssize_t *size) {
        if (PyUnicode_IS_COMPACT_ASCII(text)) {  /* its memory is UTF-8 already */
            *size = PyUnicode_GET_LENGTH(text);
            return (unsigned char *)PyUnicode_DATA(text);
        }
        return (unsigned char *)PyUnicode_AsUTF8AndSize(text, size);
    }
    static inline unsigned char *shm_text_pointer(PyObject *text) {
        Py_ssize_t size;
        return shm_utf8(text, &size);
    }
    static inline Py_ssize_t shm_text_size(PyObject *text) {
        Py_ssize_t size = 0;
        return shm_utf8(text, &size) ? size : -1;
    }
    static inline int shm_is_long_long(PyObject *number) {
        int overflow;
        PyLong_AsLongLongAndOverflow(number, &overflow);
        return !overflow;
    }
    #define shm_bytes_data(b) ((unsigned char *)PyBytes_AS_STRING(b))
    #define shm_bytes_length(b) ((unsigned long long)PyBytes_GET_SIZE(b))
    static inline int shm_is_ascii(const char *bytes, Py_ssize_t size) {
        shm_word bits = 0, part;
        Py_ssize_t i;
        for (i = 0; i + 8 <= size; i += 8) { memcpy(&part, bytes + i, 8); bits |= part; }
        if (size >= 8) { memcpy(&part, bytes + size - 8, 8); bits |= part; }  /* the rest, some of it again */
        else for (; i < size; i++) bits |= (unsigned char)bytes[i];
        return !(bits & 0x8080808080808080ULL);
    }
    static inline PyObject *shm_decode(const char *bytes, Py_ssize_t size) {
        PyObject *text;
        if (shm_is_ascii(bytes, size)) {  /* as most text is: a third of what the decoder takes */
            text = PyUnicode_New(size, 127);
            if (text) memcpy(PyUnicode_DATA(text), bytes, size);
            return text;
        }
        text = PyUnicode_DecodeUTF8(bytes, size, NULL);
        if (text == NULL && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
            PyErr_Clear();
            text = Py_NewRef(Py_None);
        }
        return text;
    }
    static inline PyObject *shm_new_bytes(shm_word size) {
        PyObject *made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
        if (made == NULL) {
            PyErr_Clear();
            made = Py_NewRef(Py_None);
        }
        return made;
    }
    static inline int shm_fill_at(PyObject *target, shm_word at, const unsigned char *s, shm_word ssize, shm_word start,
                                  shm_word n) {
        unsigned char *d;
        shm_word dsize;
        if (PyBytes_CheckExact(target)) {
            d = (unsigned char *)PyBytes_AS_STRING(target);
            dsize = (shm_word)PyBytes_GET_SIZE(target);
        } else if (PyByteArray_CheckExact(target)) {
            d = (unsigned char *)PyByteArray_AS_STRING(target);
            dsize = (shm_word)PyByteArray_GET_SIZE(target);
        } else return 0;
        if (SHM_UNLIKELY(!shm_bytes_inside(dsize, at, n) || !shm_bytes_inside(ssize, start, n))) return 0;
        memcpy(d + at, s + start, n);
        return 1;
    }
    #define shm_fill(t, at, s, start, n) shm_fill_at(t, at, SHM_BYTES(s), start, n)
    #define shm_finished(b) Py_NewRef(b)
    #define shm_make_text(d, at, n) shm_decode((const char *)(d).data + (at), (Py_ssize_t)(n))
    #define shm_make_bytes(d, at, n) PyBytes_FromStringAndSize((const char *)(d).data + (at), (Py_ssize_t)(n))
    """
    bint is_ascii "PyUnicode_IS_COMPACT_ASCII"(object text) noexcept
    unsigned long long ascii_size "PyUnicode_GET_LENGTH"(object text) noexcept
    unsigned char* ascii_pointer "(unsigned char *)PyUnicode_DATA"(object text) noexcept
    unsigned char* text_pointer "shm_text_pointer"(object text) except NULL
    Py_ssize_t text_size "shm_text_size"(object text) except -1
    bint is_long_long "shm_is_long_long"(object number) noexcept
    unsigned char* bytes_pointer "shm_bytes_data"(object data) noexcept
    unsigned long long bytes_size "shm_bytes_length"(object data) noexcept
    object new_bytes "shm_new_bytes"(unsigned long long size)
    bint fill "shm_fill"(
        object target, unsigned long long at, unsigned char[::1] source, unsigned long long start,
        unsigned long long size) noexcept
    object finished "shm_finished"(object made)
    object make_text "shm_make_text"(unsigned char[::1] data, unsigned long long at, unsigned long long size)
    object make_bytes "shm_make_bytes"(unsigned char[::1] data, unsigned long long at, unsigned long long size)
