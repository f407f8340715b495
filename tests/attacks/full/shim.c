/* Fails the n-th call that changes a file below a folder, and every later one: arm(folder, n, errno); calls(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char below[PATH_MAX];
static int at, error, count;

void arm(const char *folder, int n, int code) {
    strncpy(below, folder, sizeof below - 1);
    at = n, error = code, count = 0;
}

int calls(void) { return count; }

static int refuses(const char *path) {
    if (!below[0] || strncmp(path, below, strlen(below))) return 0;
    if (__sync_add_and_fetch(&count, 1) < at) return 0;
    errno = error;
    return 1;
}

static int refuses_file(int fd) {
    char link[64], path[PATH_MAX];
    if (!below[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return refuses(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *b, size_t n) { return refuses_file(fd) ? -1 : REAL(write)(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { return refuses_file(fd) ? -1 : REAL(pwrite)(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    return refuses_file(fd) ? -1 : REAL(pwrite64)(fd, b, n, o);
}
int fsync(int fd) { return refuses_file(fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return refuses_file(fd) ? -1 : REAL(fdatasync)(fd); }
int ftruncate64(int fd, off64_t n) { return refuses_file(fd) ? -1 : REAL(ftruncate64)(fd, n); }
int rename(const char *a, const char *b) { return refuses(b) ? -1 : REAL(rename)(a, b); }
int link(const char *a, const char *b) { return refuses(b) ? -1 : REAL(link)(a, b); }
