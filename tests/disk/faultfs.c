/*
 * A disk that a test commands, below sled and below the Rust library: preloaded into `ringtail serve`.
 *
 * Below the directory FAULTFS_ROOT it
 *   - writes every change, in its order, into the journal FAULTFS_JOURNAL. From that the test makes the disk as a power cut
 *     at any moment would have left it (journal.rs, model.rs). sync_file_range is no change and no sync: it promises nothing.
 *   - refuses calls as the control page FAULTFS_CONTROL says (disk.rs): an errno for the n-th call of a kind on some
 *     files, a capacity of the file system, the end of the process at the n-th sync.
 *
 * A change and its record are made under one lock, so that the journal's order is the disk's. Calls go to the kernel with
 * syscall(), which needs no symbol of the C library to be looked up first.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define BLOCK 4096

/* The numbers are those of journal.rs and disk.rs. */
enum change { START = 1, OPEN, WRITE, TRUNCATE, RENAME, UNLINK, MKDIR, RMDIR, SYNC_BEGIN, SYNC_END };
enum call { CALL_CREATE = 1, CALL_WRITE, CALL_SYNC, CALL_READ, CALL_RESERVE, CALL_MKDIR };

struct record {
    uint32_t change;
    uint32_t handle;
    uint64_t number; /* offset, length, flags or the number of a sync */
    uint32_t path_bytes;
    uint32_t data_bytes;
};

struct rule {
    uint32_t call;
    int32_t error;
    uint64_t skip;
    uint64_t times;
    uint64_t hits;
    uint64_t byte; /* only reads of this byte of a file; 0: all */
    char prefix[32];
    char suffix[32];
};

#define RULES 8
struct control {
    uint64_t capacity; /* 0: no limit */
    uint64_t kill_at_sync; /* 0: never */
    uint64_t syncs;
    struct rule rules[RULES];
};

/* Files and directories that are open below the root, by descriptor. */
#define FILES 65536
#define PATH_BYTES 256
static uint32_t handle_of[FILES];
static char path_of[FILES][PATH_BYTES];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_bytes;
static int journal = -1;
static struct control *control;
static uint32_t last_handle;

static void die(const char *what) {
    dprintf(2, "faultfs: %s: %s\n", what, strerror(errno));
    abort();
}

static void note(enum change change, uint32_t handle, uint64_t number, const char *path, const void *data, size_t bytes) {
    struct record record = {change, handle, number, (uint32_t)strlen(path), (uint32_t)bytes};
    struct iovec parts[3] = {{&record, sizeof record}, {(void *)path, record.path_bytes}, {(void *)data, bytes}};
    ssize_t wanted = (ssize_t)(sizeof record + record.path_bytes + bytes);
    if (syscall(SYS_writev, journal, parts, 3) != wanted) die("write journal");
}

__attribute__((constructor)) static void start(void) {
    const char *directory = getenv("FAULTFS_ROOT"), *to = getenv("FAULTFS_JOURNAL"), *page = getenv("FAULTFS_CONTROL");
    if (!directory || !to || !page) return;
    int file = (int)syscall(SYS_openat, AT_FDCWD, page, O_RDWR | O_CLOEXEC, 0);
    void *shared = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    journal = (int)syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0 || shared == MAP_FAILED || journal < 0) die("start");
    syscall(SYS_close, file);
    control = shared;
    strncpy(root, directory, sizeof root - 1);
    root_bytes = strlen(root);
    note(START, 0, 0, "", NULL, 0);
}

/* The path below the root that a call means; NULL if it is not there. */
static const char *inside(int directory, const char *path, char *buffer) {
    if (!root_bytes || !path) return NULL;
    if (path[0] != '/') {
        if (directory < 0 || directory >= FILES || !handle_of[directory]) return NULL;
        if (snprintf(buffer, PATH_BYTES, "%s/%s", path_of[directory], path) >= PATH_BYTES) die("path too long");
        return buffer[0] == '/' ? buffer + 1 : buffer;
    }
    if (strncmp(path, root, root_bytes) != 0 || (path[root_bytes] && path[root_bytes] != '/')) return NULL;
    path += root_bytes;
    while (*path == '/') path++;
    if (strlen(path) >= PATH_BYTES) die("path too long");
    strcpy(buffer, path);
    for (size_t end = strlen(buffer); end && buffer[end - 1] == '/'; end--) buffer[end - 1] = 0;
    return buffer;
}

static int tracked(int file) { return file >= 0 && file < FILES && handle_of[file]; }

static int64_t used;
static int count_blocks(const char *path, const struct stat *stat, int type, struct FTW *at) {
    (void)path, (void)type, (void)at;
    used += stat->st_blocks * 512;
    return 0;
}

static int64_t space_left(void) {
    used = 0;
    nftw(root, count_blocks, 16, FTW_PHYS);
    return (int64_t)control->capacity - used;
}

/* Whether a call is to be refused: errno is set then. `bytes`: blocks that it would take; or, from `from` on, what it reads. */
static int refused(enum call call, const char *path, int64_t bytes, uint64_t from) {
    for (int at = 0; at < RULES; at++) {
        struct rule *rule = &control->rules[at];
        size_t length = strlen(path), suffix = strlen(rule->suffix);
        if (rule->call != (uint32_t)call || strncmp(path, rule->prefix, strlen(rule->prefix)) != 0) continue;
        if (length < suffix || strcmp(path + length - suffix, rule->suffix) != 0) continue;
        if (rule->byte && (rule->byte < from || rule->byte - from >= (uint64_t)bytes)) continue;
        if (rule->skip) {
            rule->skip--;
        } else if (rule->times) {
            rule->times--;
            rule->hits++;
            errno = rule->error;
            return 1;
        }
    }
    if (call != CALL_READ && control->capacity && bytes > 0 && bytes > space_left()) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

/* Blocks that a file has to get to reach `end`. What is reserved begins at its start. */
static int64_t missing(int file, int64_t end) {
    struct stat stat;
    if (!control->capacity || fstat(file, &stat) != 0) return 0;
    return (end + BLOCK - 1) / BLOCK * BLOCK - stat.st_blocks * 512;
}

static void follow(int file, const char *path, uint64_t flags) {
    if (file >= FILES) die("too many files");
    handle_of[file] = ++last_handle;
    strcpy(path_of[file], path);
    note(OPEN, handle_of[file], flags, path, NULL, 0);
}

static int open_at(int directory, const char *path, int flags, mode_t mode) {
    char buffer[PATH_BYTES];
    const char *below = inside(directory, path, buffer);
    if (!below) return (int)syscall(SYS_openat, directory, path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat stat;
    int exists = syscall(SYS_newfstatat, directory, path, &stat, 0) == 0;
    int file = -1;
    if (exists || !(flags & O_CREAT) || !refused(CALL_CREATE, below, BLOCK, 0)) {
        file = (int)syscall(SYS_openat, directory, path, flags, mode);
    }
    if (file >= 0) follow(file, below, (exists ? 0 : 1) | (flags & O_TRUNC ? 2 : 0));
    pthread_mutex_unlock(&lock);
    return file;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

EXPORT int open(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
EXPORT int open64(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
EXPORT int openat(int at, const char *path, int flags, ...) { MODE(flags) return open_at(at, path, flags, mode); }
EXPORT int openat64(int at, const char *path, int flags, ...) { MODE(flags) return open_at(at, path, flags, mode); }
EXPORT int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
EXPORT int creat64(const char *path, mode_t mode) { return creat(path, mode); }
static void forget(int file) {
    if (tracked(file)) {
        pthread_mutex_lock(&lock);
        handle_of[file] = 0;
        pthread_mutex_unlock(&lock);
    }
}

EXPORT int close(int file) {
    forget(file);
    return (int)syscall(SYS_close, file);
}

EXPORT int closedir(DIR *directory) {
    int (*real)(DIR *) = (int (*)(DIR *))dlsym(RTLD_NEXT, "closedir");
    forget(dirfd(directory));
    return real(directory);
}

static int copied(int file, int copy) {
    if (copy >= 0 && copy < FILES && tracked(file)) {
        pthread_mutex_lock(&lock);
        handle_of[copy] = handle_of[file];
        memmove(path_of[copy], path_of[file], PATH_BYTES);
        pthread_mutex_unlock(&lock);
    }
    return copy;
}

EXPORT int dup(int file) { return copied(file, (int)syscall(SYS_dup, file)); }

EXPORT int fcntl(int file, int command, ...) {
    va_list rest;
    va_start(rest, command);
    long argument = va_arg(rest, long);
    va_end(rest);
    int result = (int)syscall(SYS_fcntl, file, command, argument);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? copied(file, result) : result;
}

/* Writes at `offset`, or where the file's own position is if that is negative. */
static ssize_t write_at(int file, const void *data, size_t bytes, off_t offset) {
    pthread_mutex_lock(&lock);
    int appends = offset < 0;
    struct stat stat;
    if (appends) {
        offset = lseek(file, 0, SEEK_CUR);
        if (syscall(SYS_fcntl, file, F_GETFL) & O_APPEND && fstat(file, &stat) == 0) offset = stat.st_size;
    }
    ssize_t written = -1;
    if (!refused(CALL_WRITE, path_of[file], missing(file, offset + (off_t)bytes), 0)) {
        written = appends ? syscall(SYS_write, file, data, bytes) : syscall(SYS_pwrite64, file, data, bytes, offset);
    }
    if (written > 0) note(WRITE, handle_of[file], (uint64_t)offset, "", data, (size_t)written);
    pthread_mutex_unlock(&lock);
    return written;
}

EXPORT ssize_t write(int file, const void *data, size_t bytes) {
    return tracked(file) ? write_at(file, data, bytes, -1) : syscall(SYS_write, file, data, bytes);
}

EXPORT ssize_t pwrite64(int file, const void *data, size_t bytes, off_t offset) {
    return tracked(file) ? write_at(file, data, bytes, offset) : syscall(SYS_pwrite64, file, data, bytes, offset);
}
EXPORT ssize_t pwrite(int file, const void *data, size_t bytes, off_t offset) {
    return pwrite64(file, data, bytes, offset);
}

/* A short write is allowed: the first part is written, and the caller goes on with the rest. */
EXPORT ssize_t writev(int file, const struct iovec *parts, int count) {
    if (!tracked(file)) return syscall(SYS_writev, file, parts, count);
    return count ? write_at(file, parts[0].iov_base, parts[0].iov_len, -1) : 0;
}

EXPORT ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset) {
    if (!tracked(file)) return syscall(SYS_pwritev, file, parts, count, offset, 0);
    return count ? write_at(file, parts[0].iov_base, parts[0].iov_len, offset) : 0;
}

static int read_fails(int file, size_t bytes, off_t offset) {
    if (!tracked(file)) return 0;
    pthread_mutex_lock(&lock);
    int fails = refused(CALL_READ, path_of[file], bytes, offset);
    pthread_mutex_unlock(&lock);
    return fails;
}

EXPORT ssize_t read(int file, void *data, size_t bytes) {
    return read_fails(file, bytes, lseek(file, 0, SEEK_CUR)) ? -1 : syscall(SYS_read, file, data, bytes);
}

EXPORT ssize_t pread64(int file, void *data, size_t bytes, off_t offset) {
    return read_fails(file, bytes, offset) ? -1 : syscall(SYS_pread64, file, data, bytes, offset);
}
EXPORT ssize_t pread(int file, void *data, size_t bytes, off_t offset) { return pread64(file, data, bytes, offset); }

EXPORT int ftruncate64(int file, off_t length) {
    if (!tracked(file)) return (int)syscall(SYS_ftruncate, file, length);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_ftruncate, file, length);
    if (result == 0) note(TRUNCATE, handle_of[file], (uint64_t)length, "", NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}
EXPORT int ftruncate(int file, off_t length) { return ftruncate64(file, length); }

EXPORT int fallocate(int file, int mode, off_t offset, off_t length) {
    if (!tracked(file)) return (int)syscall(SYS_fallocate, file, mode, offset, length);
    if (mode != FALLOC_FL_KEEP_SIZE) die("fallocate that changes the size is not in the model");
    pthread_mutex_lock(&lock);
    int fails = refused(CALL_RESERVE, path_of[file], missing(file, offset + length), 0);
    int result = fails ? -1 : (int)syscall(SYS_fallocate, file, mode, offset, length);
    pthread_mutex_unlock(&lock);
    return result;
}

/* The sync itself is not under the lock: others write meanwhile, and what they write it need not cover. */
static int sync_file(int file, long number) {
    if (!tracked(file)) return (int)syscall(number, file);
    pthread_mutex_lock(&lock);
    uint64_t count = ++control->syncs;
    uint32_t handle = handle_of[file];
    int fails = refused(CALL_SYNC, path_of[file], 0, 0), error = errno;
    if (control->kill_at_sync && count == control->kill_at_sync) {
        /* Under the lock nobody is between a change and its record. */
        kill(getpid(), SIGKILL);
        pause();
    }
    note(SYNC_BEGIN, handle, count, "", NULL, 0);
    pthread_mutex_unlock(&lock);
    if (fails) {
        errno = error;
        return -1;
    }
    int result = (int)syscall(number, file);
    if (result == 0) {
        pthread_mutex_lock(&lock);
        note(SYNC_END, handle, count, "", NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return result;
}

EXPORT int fsync(int file) { return sync_file(file, SYS_fsync); }
EXPORT int fdatasync(int file) { return sync_file(file, SYS_fdatasync); }

EXPORT int renameat(int from_at, const char *from, int to_at, const char *to) {
    char from_buffer[PATH_BYTES], to_buffer[PATH_BYTES];
    const char *source = inside(from_at, from, from_buffer), *target = inside(to_at, to, to_buffer);
    if (!source || !target) return (int)syscall(SYS_renameat2, from_at, from, to_at, to, 0);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_renameat2, from_at, from, to_at, to, 0);
    if (result == 0) note(RENAME, 0, 0, source, target, strlen(target));
    pthread_mutex_unlock(&lock);
    return result;
}
EXPORT int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

EXPORT int unlinkat(int directory, const char *path, int flags) {
    char buffer[PATH_BYTES];
    const char *below = inside(directory, path, buffer);
    if (!below) return (int)syscall(SYS_unlinkat, directory, path, flags);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_unlinkat, directory, path, flags);
    if (result == 0) note(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, 0, below, NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

EXPORT int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
EXPORT int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

EXPORT int mkdirat(int directory, const char *path, mode_t mode) {
    char buffer[PATH_BYTES];
    const char *below = inside(directory, path, buffer);
    if (!below) return (int)syscall(SYS_mkdirat, directory, path, mode);
    pthread_mutex_lock(&lock);
    struct stat stat;
    int exists = syscall(SYS_newfstatat, directory, path, &stat, 0) == 0;
    int result = !exists && refused(CALL_MKDIR, below, BLOCK, 0) ? -1 : (int)syscall(SYS_mkdirat, directory, path, mode);
    if (result == 0) note(MKDIR, 0, 0, below, NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}
EXPORT int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

EXPORT int statvfs(const char *path, struct statvfs *result) {
    int (*real)(const char *, struct statvfs *) = (int (*)(const char *, struct statvfs *))dlsym(RTLD_NEXT, "statvfs");
    int status = real(path, result);
    char buffer[PATH_BYTES];
    if (status == 0 && inside(AT_FDCWD, path, buffer) && control->capacity) {
        pthread_mutex_lock(&lock);
        int64_t left = space_left();
        pthread_mutex_unlock(&lock);
        result->f_bavail = result->f_bfree = (fsblkcnt_t)(left > 0 ? left : 0) / result->f_frsize;
    }
    return status;
}
