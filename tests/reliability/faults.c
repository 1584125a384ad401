/* Makes the n-th call that changes files below a directory fail, for tests.

   Preloaded (LD_PRELOAD) into a process that arms it through ctypes. Counted are: opening with
   O_CREAT, write, pwrite, writev, sendfile, copy_file_range, ftruncate, fsync, fdatasync, mkdir,
   link, rename and renameat2. With `lasting` everything but renames fails from then on, as on a
   full disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int armed, number, code, lasting, seen;
static char below[PATH_MAX], hit[64];

void faults_arm(const char *folder, int n, int error, int last) {
    strncpy(below, folder, sizeof below - 1);
    number = n, code = error, lasting = last, seen = 0, hit[0] = 0, armed = 1;
}
int faults_disarm(void) { armed = 0; return seen; }
const char *faults_hit(void) { return hit; }

static int strike(const char *call, int ours, int renames) {
    if (!ours) return 0;
    seen++;
    if (seen == number || (lasting && seen > number && number > 0 && !renames)) {
        if (!hit[0]) snprintf(hit, sizeof hit, "%s", call);
        errno = code;
        return 1;
    }
    return 0;
}
static int named(const char *path) {
    return armed && path && strncmp(path, below, strlen(below)) == 0;
}
static int opened(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return named(path);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        mode_t mode = 0;                                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {                              \
            va_list rest; va_start(rest, flags);                          \
            mode = va_arg(rest, int); va_end(rest);                       \
        }                                                                 \
        if ((flags & O_CREAT) && strike("open", named(path), 0)) return -1; \
        return REAL(name)(path, flags, mode);                             \
    }
#define OPENAT(name)                                                      \
    int name(int at, const char *path, int flags, ...) {                  \
        mode_t mode = 0;                                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {                              \
            va_list rest; va_start(rest, flags);                          \
            mode = va_arg(rest, int); va_end(rest);                       \
        }                                                                 \
        if ((flags & O_CREAT) && strike("open", named(path), 0)) return -1; \
        return REAL(name)(at, path, flags, mode);                         \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t n) {
    return strike("write", opened(fd), 0) ? -1 : REAL(write)(fd, data, n);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    return strike("write", opened(fd), 0) ? -1 : REAL(pwrite)(fd, data, n, at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    return strike("write", opened(fd), 0) ? -1 : REAL(pwrite64)(fd, data, n, at);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    return strike("write", opened(fd), 0) ? -1 : REAL(writev)(fd, parts, n);
}
ssize_t sendfile(int out, int in, off_t *at, size_t n);
ssize_t sendfile(int out, int in, off_t *at, size_t n) {
    return strike("write", opened(out), 0) ? -1 : REAL(sendfile)(out, in, at, n);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t n);
ssize_t sendfile64(int out, int in, off64_t *at, size_t n) {
    return strike("write", opened(out), 0) ? -1 : REAL(sendfile64)(out, in, at, n);
}
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned flags) {
    return strike("write", opened(out), 0) ? -1 : REAL(copy_file_range)(in, a, out, b, n, flags);
}
int ftruncate(int fd, off_t n) {
    return strike("write", opened(fd), 0) ? -1 : REAL(ftruncate)(fd, n);
}
int ftruncate64(int fd, off64_t n) {
    return strike("write", opened(fd), 0) ? -1 : REAL(ftruncate64)(fd, n);
}
int fsync(int fd) { return strike("fsync", opened(fd), 0) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return strike("fsync", opened(fd), 0) ? -1 : REAL(fdatasync)(fd); }
int mkdir(const char *path, mode_t mode);
int mkdir(const char *path, mode_t mode) {
    return strike("mkdir", named(path), 0) ? -1 : REAL(mkdir)(path, mode);
}
int link(const char *from, const char *to) {
    return strike("link", named(to), 0) ? -1 : REAL(link)(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    return strike("link", named(to), 0) ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int rename(const char *from, const char *to) {
    return strike("rename", named(to), 1) ? -1 : REAL(rename)(from, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return strike("rename", named(to), 1) ? -1 : REAL(renameat2)(a, from, b, to, flags);
}
