/* Threads that share the work of a call. They spin while they wait for each other, but give their core up as
 * soon as somebody else wants it, so that a machine with other things to do, or a quota, is not spent on waiting.
 *
 * A call is a row of phases. Each phase is cut into pieces. Each thread does the pieces of its own share first.
 * Then it glances at the others for some microseconds, and takes over what they have not begun. A thread that the
 * kernel does not run therefore holds up nobody: the caller waits only for pieces that somebody has begun. A
 * thread that loses its core for long in the middle of a piece takes no part for a while: the machine has no core
 * for it. Glances come before taking over because each look at another thread's share costs both a cache miss. */
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
    MOST_CLAIMS = 8,              /* pieces of a thread's own share */
    GLANCES = 100,                 /* at others before their pieces are taken over, 25 ns each */
    SPIN = 20000,                  /* nanoseconds that a worker waits without offering its core to others */
    LINGER = 2000000,              /* nanoseconds that it waits in all before it sleeps, unless others want it */
    TAKEN = 20000,                 /* nanoseconds: an offer that took longer was accepted by somebody */
    CROWDED = 64,                  /* waits after that in which it sleeps after SPIN */
    LATE = 50000,                  /* nanoseconds for a piece, beyond what others of its phase took */
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
    int64_t crowded;          /* waits to go that give up the core soon; its own */
    uint64_t born;            /* phase after which it began to serve */
    int64_t rest, rest_until; /* nanoseconds; the caller's */
} worker;

typedef struct {
    work *run;
    const void *job;
    int64_t count, pieces, threads;
} task;

static struct {
    _Alignas(64) _Atomic uint64_t phase; /* its task is in slots[phase % 2] */
    struct {
        _Alignas(64) _Atomic(work *) run;
        _Atomic(const void *) job;
        _Atomic int64_t count, pieces, threads;
    } slots[2];
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

/* Do what is left of a thread's share; returns how many pieces that were. */
static int64_t take_share(const task *t, uint64_t phase, int64_t owner, int64_t thread) {
    const range own = share(t->pieces, owner, t->threads);
    int64_t taken = 0;
    for (int64_t next; (next = claim(&pool.workers[owner], phase, own.end - own.first)) >= 0; taken++)
        t->run(t->job, share(t->count, own.first + next, t->pieces), thread);
    return taken;
}

/* Do what is left of all others' shares. */
static int64_t take_from_others(const task *t, uint64_t phase, int64_t thread) {
    int64_t taken = 0;
    for (int64_t i = 1; i < t->threads; i++) taken += take_share(t, phase, (thread + i) % t->threads, thread);
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

/* The next phase, whose task has been written, or the one before where that lasts for long. */
static uint64_t await_phase(worker *self, uint64_t seen, int helps) {
    int64_t start = 0;
    for (uint64_t turns = 1;; turns++) {
        const uint64_t phase = atomic_load_explicit(&pool.phase, memory_order_acquire);
        const int resting = atomic_load_explicit(&self->resting, memory_order_relaxed) != 0;
        if (phase != seen && !resting) return phase;
        if (helps && turns == GLANCES && phase == seen && !resting) return phase;
        _mm_pause();
        if (turns % 32 && !resting) continue;
        const int64_t now = nanoseconds();
        if (!start) start = now;
        if (resting || now - start > (self->crowded ? SPIN : LINGER)) {
            self->crowded -= self->crowded > 0;
            sleep_until_called(self, seen);
            start = 0;
        } else if (now - start > SPIN) {
            sched_yield();
            if (nanoseconds() - now > TAKEN) self->crowded = CROWDED;
        }
    }
}

/* What is to be done in a phase: only where that still lasts when this has been read. */
static inline task read_task(uint64_t phase) {
    return (task){atomic_load_explicit(&pool.slots[phase % 2].run, memory_order_relaxed),
                  atomic_load_explicit(&pool.slots[phase % 2].job, memory_order_relaxed),
                  atomic_load_explicit(&pool.slots[phase % 2].count, memory_order_relaxed),
                  atomic_load_explicit(&pool.slots[phase % 2].pieces, memory_order_relaxed),
                  atomic_load_explicit(&pool.slots[phase % 2].threads, memory_order_relaxed)};
}

static inline void write_task(const task *t, uint64_t phase) {
    atomic_thread_fence(memory_order_release); /* who reads this knows that the phase two before is over */
    atomic_store_explicit(&pool.slots[phase % 2].run, t->run, memory_order_relaxed);
    atomic_store_explicit(&pool.slots[phase % 2].job, t->job, memory_order_relaxed);
    atomic_store_explicit(&pool.slots[phase % 2].count, t->count, memory_order_relaxed);
    atomic_store_explicit(&pool.slots[phase % 2].pieces, t->pieces, memory_order_relaxed);
    atomic_store_explicit(&pool.slots[phase % 2].threads, t->threads, memory_order_relaxed);
}

static void *serve(void *argument) {
    worker *self = argument;
    const int64_t thread = self - pool.workers;
    int helps = 0; /* whether it has done its share of the last phase, and no more */
    for (uint64_t phase = self->born;;) {
        const uint64_t last = phase;
        phase = await_phase(self, last, helps);
        const task t = read_task(phase);
        atomic_thread_fence(memory_order_acquire);
        helps = phase != last;
        if (atomic_load_explicit(&pool.phase, memory_order_relaxed) != phase || thread >= t.threads) continue;
        atomic_store_explicit(&self->working, phase, memory_order_relaxed);
        const int64_t taken = helps ? take_share(&t, phase, thread, thread) : take_from_others(&t, phase, thread);
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

/* Wait until workers have done what they began. started: when the phase did; taken: pieces done since. */
static void await_done(uint32_t target, uint64_t phase, int64_t threads, int64_t started, int64_t taken) {
    const int64_t start = nanoseconds(), piece = taken ? (start - started) / taken : 0;
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

/* Whether workers have done so many pieces, or are about to: not where some sleep, who begin late. */
static inline int is_done(uint32_t target) {
    for (int turn = 0; atomic_load_explicit(&pool.done, memory_order_acquire) != target; turn++) {
        if (turn == GLANCES || atomic_load_explicit(&pool.sleepers, memory_order_relaxed)) return 0;
        _mm_pause();
    }
    return 1;
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
    const uint64_t phase = atomic_load_explicit(&pool.phase, memory_order_relaxed) + 1;
    const uint32_t done = atomic_load_explicit(&pool.done, memory_order_relaxed);
    write_task(&t, phase);
    atomic_store(&pool.phase, phase);
    if (atomic_load(&pool.sleepers)) wake_workers(threads);
    const int64_t start = nanoseconds();
    int64_t taken = take_share(&t, phase, 0, 0);
    if (!is_done(done + (uint32_t)(t.pieces - taken))) {
        taken += take_from_others(&t, phase, 0);
        const uint32_t target = done + (uint32_t)(t.pieces - taken);
        if (atomic_load_explicit(&pool.done, memory_order_acquire) != target)
            await_done(target, phase, threads, start, taken);
    }
    atomic_flag_clear_explicit(&pool.taken, memory_order_release);
}
