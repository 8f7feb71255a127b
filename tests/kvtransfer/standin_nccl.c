/* In NCCL's place where there is no GPU: communicators of two within one process, which copy memory
   and which hang and fail on command. */

#include <pthread.h>
#include <stddef.h>
#include <string.h>

enum { OK, HANG, FAIL, STUCK };

typedef struct { char bytes[128]; } unique_id;

typedef struct comm {
    unique_id id;
    struct comm *peer;
    const void *out;
    size_t num_bytes;
    int aborted;
    int num_stuck;
} comm;

enum { MOST = 256 };
static comm comms[MOST];
static int num_comms, num_ids, num_aborts;
static int on_start, on_send, on_receive, on_abort;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

/* Commands. Whoever hangs goes on when the command is another one. */

void standin_do(int start, int send, int receive, int abort) {
    pthread_mutex_lock(&lock);
    on_start = start, on_send = send, on_receive = receive, on_abort = abort;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

int standin_num_aborts(void) { return num_aborts; }

/* Whether what was queued on the device is done: all streams of a process are one here. */
int standin_is_done(void) {
    int stuck = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_comms; i++) stuck += comms[i].num_stuck;
    pthread_mutex_unlock(&lock);
    return !stuck;
}

void standin_reset(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_comms; i++) comms[i].num_stuck = 0;
    on_start = on_send = on_receive = on_abort = OK;
    num_aborts = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* NCCL's. */

const char *ncclGetErrorString(int result) { return result ? "remote process exited" : "no error"; }
int ncclGetVersion(int *version) { *version = 22900; return 0; }

int ncclGetUniqueId(unique_id *id) {
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&lock);
    int number = ++num_ids;
    pthread_mutex_unlock(&lock);
    memcpy(id->bytes, &number, sizeof number);
    return 0;
}

int ncclCommInitRank(comm **made, int num_ranks, unique_id id, int rank) {
    pthread_mutex_lock(&lock);
    while (on_start == HANG) pthread_cond_wait(&changed, &lock);
    int result = on_start == FAIL || num_comms == MOST;
    if (!result) {
        comm *mine = *made = &comms[num_comms++];
        mine->id = id;
        for (int i = 0; i < num_comms - 1; i++)
            if (!memcmp(&comms[i].id, &id, sizeof id)) mine->peer = &comms[i], comms[i].peer = mine;
        pthread_cond_broadcast(&changed);
        while (!mine->peer) pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static int hang_or_fail(comm *mine, int command) {
    if (command == STUCK) mine->num_stuck++;
    while (command == HANG && !mine->aborted) pthread_cond_wait(&changed, &lock);
    return command == FAIL || mine->aborted;
}

int ncclSend(const void *from, size_t count, int type, int peer, comm *mine, void *stream) {
    pthread_mutex_lock(&lock);
    int command = on_send, result = hang_or_fail(mine, command);
    if (command == OK) {
        mine->out = from, mine->num_bytes = count;
        pthread_cond_broadcast(&changed);
        while (mine->out && !mine->aborted) pthread_cond_wait(&changed, &lock);
        result = mine->aborted;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int ncclRecv(void *to, size_t count, int type, int peer, comm *mine, void *stream) {
    pthread_mutex_lock(&lock);
    int command = on_receive, result = hang_or_fail(mine, command);
    if (command == OK) {
        while (!mine->peer->out && !mine->aborted) pthread_cond_wait(&changed, &lock);
        if (!mine->aborted) {
            memcpy(to, mine->peer->out, count < mine->peer->num_bytes ? count : mine->peer->num_bytes);
            mine->peer->out = NULL;
            pthread_cond_broadcast(&changed);
        }
        result = mine->aborted;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int ncclCommAbort(comm *mine) {
    pthread_mutex_lock(&lock);
    while (on_abort == HANG) pthread_cond_wait(&changed, &lock);
    mine->aborted = 1;
    if (on_abort != STUCK) mine->num_stuck = 0;
    num_aborts++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return 0;
}

