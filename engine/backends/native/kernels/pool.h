/* Threads that share the work of a call. They wait for each other only briefly without giving up their core, so
 * that a machine with other things to do, or a quota, is not spent on waiting.
 *
 * A call is a row of phases; each is cut into pieces, and a piece is whose claims it first, each thread from a
 * share of its own and then from the others'. A thread that the kernel does not run therefore holds up nobody:
 * the caller does its pieces, and waits for those alone that somebody has begun. A
 * thread that loses its core for long in the middle of a piece takes no part for a while: the machine has no core
 * for it. */
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = 256,
    MOST_CLAIMS = 16,              /* pieces of a thread's own share */
    SPIN = 20000,                  /* nanoseconds of waiting on a core that nobody else may have */
    YIELD = 100000,                /* and of waiting on one that others may have, in all */
    LATE = 50000,                  /* for a piece, beyond the time that others of its phase took */
    REST = 4, MOST_REST = 250000000 /* of one who was late: in times of what others waited, and at most */
};

typedef struct { int64_t first, end; } range;

static inline range share(int64_t count, int64_t part, int64_t parts) {
    return (range){count * part / parts, count * (part + 1) / parts};
}

/* Some items of a job, done by one of the threads. What an item comes to must not depend on which. */
typedef void work(const void *job, range items, int64_t thread);

typedef struct {
    _Alignas(64) _Atomic uint64_t claimed; /* the phase, and in the lowest byte how many pieces of the share */
    _Alignas(64) _Atomic uint64_t working; /* phase in which it may have begun a piece */
    _Atomic uint32_t asleep, resting;
    uint64_t born;            /* phase after which it began to serve */
    int64_t rest, rest_until; /* nanoseconds; the caller's */
} worker;

typedef struct {
    work *run;
    const void *job;
    int64_t count, pieces, threads;
} task;

static struct {
    _Alignas(64) _Atomic uint64_t phase; /* odd while the next task is being written */
    _Atomic(work *) run;
    _Atomic(const void *) job;
    _Atomic int64_t count, pieces, threads;
    _Alignas(64) _Atomic uint32_t done; /* pieces that workers have done since the beginning */
    _Atomic uint32_t waiting;           /* whether the caller sleeps until there are more */
    _Alignas(64) _Atomic uint32_t sleepers;
    atomic_flag taken; /* by the one caller whom workers serve */
    int64_t started;   /* threads, the caller among them */
    worker workers[MAX_THREADS];
} pool = {.taken = ATOMIC_FLAG_INIT, .started = 1};

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static void futex(_Atomic uint32_t *word, int operation, uint32_t value) {
    syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* A piece of a share in a phase, or -1 where none is left or the phase is over. A word that tells of an earlier
 * phase says that none is taken yet. */
static inline int64_t claim(worker *owner, uint64_t phase, int64_t pieces) {
    uint64_t seen = atomic_load_explicit(&owner->claimed, memory_order_relaxed);
    for (;;) {
        const int64_t next = seen >> 8 == phase ? (int64_t)(seen & 0xff) : 0;
        if (seen >> 8 > phase || next >= pieces) return -1;
        if (atomic_compare_exchange_weak(&owner->claimed, &seen, phase << 8 | (uint64_t)(next + 1))) return next;
    }
}

/* Do what is left of a task; returns how many pieces that were. */
static int64_t take_part(const task *t, uint64_t phase, int64_t thread) {
    int64_t taken = 0;
    for (int64_t i = 0; i < t->threads; i++) {
        const int64_t owner = (thread + i) % t->threads;
        const range own = share(t->pieces, owner, t->threads);
        for (int64_t next; (next = claim(&pool.workers[owner], phase, own.end - own.first)) >= 0; taken++)
            t->run(t->job, share(t->count, own.first + next, t->pieces), thread);
    }
    return taken;
}

static void sleep_until_called(worker *self, uint64_t seen) {
    atomic_store(&self->asleep, 1);
    atomic_fetch_add(&pool.sleepers, 1);
    if (atomic_load(&pool.phase) == seen || atomic_load(&self->resting))
        while (atomic_load(&self->asleep)) futex(&self->asleep, FUTEX_WAIT, 1);
    atomic_store(&self->asleep, 0);
    atomic_fetch_sub(&pool.sleepers, 1);
}

/* The next phase, whose task has been written. */
static uint64_t await_phase(worker *self, uint64_t seen) {
    int64_t start = 0;
    for (uint64_t turns = 1;; turns++) {
        const uint64_t phase = atomic_load_explicit(&pool.phase, memory_order_acquire);
        const int resting = atomic_load_explicit(&self->resting, memory_order_relaxed) != 0;
        if (phase != seen && phase % 2 == 0 && !resting) return phase;
        _mm_pause();
        if (turns % 32 && !resting) continue;
        const int64_t now = nanoseconds();
        if (!start) start = now;
        if (resting || now - start > YIELD) {
            sleep_until_called(self, seen);
            start = 0;
        } else if (now - start > SPIN) sched_yield();
    }
}

static void *serve(void *argument) {
    worker *self = argument;
    const int64_t thread = self - pool.workers;
    for (uint64_t phase = self->born;;) {
        phase = await_phase(self, phase);
        const task t = {atomic_load_explicit(&pool.run, memory_order_relaxed),
                        atomic_load_explicit(&pool.job, memory_order_relaxed),
                        atomic_load_explicit(&pool.count, memory_order_relaxed),
                        atomic_load_explicit(&pool.pieces, memory_order_relaxed),
                        atomic_load_explicit(&pool.threads, memory_order_relaxed)};
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load_explicit(&pool.phase, memory_order_relaxed) != phase || thread >= t.threads) continue;
        atomic_store_explicit(&self->working, phase, memory_order_relaxed);
        const int64_t taken = take_part(&t, phase, thread);
        atomic_store_explicit(&self->working, 0, memory_order_relaxed);
        if (!taken) continue;
        atomic_fetch_add(&pool.done, (uint32_t)taken);
        if (atomic_load(&pool.waiting)) futex(&pool.done, FUTEX_WAKE, 1);
    }
    return NULL;
}

/* In a child of fork there are no workers. */
static void forget_workers(void) {
    pool.started = 1;
    atomic_store(&pool.sleepers, 0);
    atomic_flag_clear(&pool.taken);
    atomic_fetch_and(&pool.phase, ~(uint64_t)1);
    for (int64_t t = 0; t < MAX_THREADS; t++) {
        worker *w = &pool.workers[t];
        atomic_store(&w->asleep, 0);
        atomic_store(&w->resting, 0);
        w->rest = w->rest_until = 0;
    }
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* Have so many threads, or as many as the system gives. Signals are none of theirs. */
static void start_workers(int64_t threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (pool.started >= threads) return;
    pthread_once(&once, watch_forks);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t made; pool.started < threads; pool.started++) {
        pool.workers[pool.started].born = atomic_load(&pool.phase);
        if (pthread_create(&made, NULL, serve, &pool.workers[pool.started])) break;
        pthread_setname_np(made, "gorgon-kernels");
        pthread_detach(made);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wake_workers(int64_t threads) {
    const int64_t started = pool.started < threads ? pool.started : threads;
    for (int64_t t = 1; t < started; t++) {
        worker *w = &pool.workers[t];
        if (!atomic_load_explicit(&w->asleep, memory_order_relaxed)) continue;
        if (atomic_load_explicit(&w->resting, memory_order_relaxed)) {
            if (nanoseconds() < w->rest_until) continue;
            atomic_store(&w->resting, 0);
        }
        atomic_store(&w->asleep, 0);
        futex(&w->asleep, FUTEX_WAKE, 1);
    }
}

/* Let those rest who hold pieces of a phase and have kept others waiting; until when, is known afterwards. Who
 * has since worked for as long as the last rest was begins anew with short ones. */
static void find_late(uint64_t phase, int64_t threads, int64_t now) {
    for (int64_t t = 1; t < threads; t++) {
        worker *w = &pool.workers[t];
        if (atomic_load_explicit(&w->working, memory_order_relaxed) != phase) continue;
        if (now - w->rest_until > w->rest) w->rest = 0;
        w->rest_until = INT64_MAX;
        atomic_store(&w->resting, 1);
    }
}

static void set_rests(int64_t threads, int64_t waited, int64_t now) {
    for (int64_t t = 1; t < threads; t++) {
        worker *w = &pool.workers[t];
        if (w->rest_until != INT64_MAX) continue;
        w->rest = 2 * w->rest > REST * waited ? 2 * w->rest : REST * waited;
        if (w->rest > MOST_REST) w->rest = MOST_REST;
        w->rest_until = now + w->rest;
    }
}

/* Wait until workers have done what they began. piece: nanoseconds that one takes. */
static void await_done(uint32_t target, uint64_t phase, int64_t threads, int64_t piece) {
    const int64_t start = nanoseconds();
    int64_t waited = 0, now = start;
    for (uint64_t turns = 1; atomic_load_explicit(&pool.done, memory_order_acquire) != target; turns++) {
        _mm_pause();
        if (turns % 32) continue;
        const int64_t last = now, most = SPIN / 4; /* more is time in which this thread did not run either */
        now = nanoseconds();
        waited += now - last < most ? now - last : most;
        if (waited <= LATE + piece) continue;
        find_late(phase, threads, now);
        atomic_store(&pool.waiting, 1);
        for (uint32_t seen; (seen = atomic_load(&pool.done)) != target;) futex(&pool.done, FUTEX_WAIT, seen);
        atomic_store(&pool.waiting, 0);
        now = nanoseconds();
        set_rests(threads, now - start, now);
        return;
    }
}

/* In how many pieces to cut, none of fewer than `grain` items: as many for each thread. */
static inline int64_t pieces_of(int64_t count, int64_t grain, int64_t threads, int64_t most_each) {
    const int64_t most = count / grain, each = most / threads;
    if (most < 2 || threads < 2) return 1;
    return each < 1 ? most : threads * (each < most_each ? each : most_each);
}

/* Run a job's items, the first of them `grain` at least to a piece, by as many threads as there are. */
static void in_parallel(work *run, const void *job, int64_t count, int64_t grain, int64_t threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    const task t = {run, job, count, pieces_of(count, grain, threads, MOST_CLAIMS), threads};
    if (t.pieces == 1 || atomic_flag_test_and_set_explicit(&pool.taken, memory_order_acquire)) {
        run(job, (range){0, count}, 0); /* too little for two, or workers serve another caller */
        return;
    }
    start_workers(threads);
    const uint64_t phase = atomic_load_explicit(&pool.phase, memory_order_relaxed) + 2;
    const uint32_t done = atomic_load_explicit(&pool.done, memory_order_relaxed);
    atomic_store_explicit(&pool.phase, phase - 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(&pool.run, run, memory_order_relaxed);
    atomic_store_explicit(&pool.job, job, memory_order_relaxed);
    atomic_store_explicit(&pool.count, count, memory_order_relaxed);
    atomic_store_explicit(&pool.pieces, t.pieces, memory_order_relaxed);
    atomic_store_explicit(&pool.threads, threads, memory_order_relaxed);
    atomic_store(&pool.phase, phase);
    if (atomic_load(&pool.sleepers)) wake_workers(threads);
    const int64_t start = nanoseconds();
    const int64_t taken = take_part(&t, phase, 0);
    const uint32_t target = done + (uint32_t)(t.pieces - taken);
    if (atomic_load_explicit(&pool.done, memory_order_acquire) != target)
        await_done(target, phase, threads, taken ? (nanoseconds() - start) / taken : 0);
    atomic_flag_clear_explicit(&pool.taken, memory_order_release);
}
