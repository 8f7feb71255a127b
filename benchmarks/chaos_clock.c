/* Preloaded into a cluster's processes: the time of day, and waits until one, by an offset that a
 * file holds in whole seconds. What runs on the monotonic clock is left alone, as by a real step. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t none = 0;
static const volatile int64_t *offset_s = &none;
static int (*real_clock)(clockid_t, struct timespec *);
static int (*real_cond)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_sem)(sem_t *, const struct timespec *);

__attribute__((constructor)) static void start(void) {
    real_clock = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CHAOS_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED)
        offset_s = mapped;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int result = real_clock ? real_clock(id, now) : (int)syscall(SYS_clock_gettime, id, now);
    if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += *offset_s;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    now->tv_sec = ts.tv_sec;
    now->tv_usec = ts.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    if (result)
        *result = ts.tv_sec;
    return ts.tv_sec;
}

/* A condition does not say which clock it goes by; only the time of day is this large. */
static struct timespec kernels(const struct timespec *until) {
    struct timespec ts = *until;
    if (ts.tv_sec > 1000000000)
        ts.tv_sec -= *offset_s;
    return ts;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    if (!real_cond)
        real_cond = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec ts = kernels(until);
    return real_cond(cond, mutex, &ts);
}

int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict until) {
    if (!real_sem)
        real_sem = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec ts = kernels(until);
    return real_sem(sem, &ts);
}
