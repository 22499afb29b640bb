/* Trees of the likeliest guesses: trees/select.py says what they are and why. Included at the end of
 * kernels.c. Requests do not meet here but in the heads' products, so each follows only what may be among its
 * own likeliest nodes. */
#pragma once

enum { MOST_PATHS = 10, GUESSES = 16, MOST_NODES = 64 };

/* What is offered to one request: the root, its chain, then what the heads guess, each after its parent. */
typedef struct {
    int64_t count, num_paths;
    float *sure; /* log-probability of the whole path */
    int32_t *parent;
    int64_t *token;
    int32_t paths[MOST_PATHS]; /* nodes whose children are guessed next */
} offers;

static int64_t most_offers(int64_t chain_length, int64_t depth) {
    return 1 + chain_length + depth * MOST_PATHS * GUESSES;
}

/* The places of the `count` largest of `n` numbers, largest first, equals in their order; fewer where there are
 * fewer. */
static int64_t largest(const float *x, int64_t n, int64_t count, int32_t *places) {
    int64_t held = 0;
    for (int64_t i = 0; i < n; i++) {
        if (held == count && !(x[i] > x[places[held - 1]])) continue;
        int64_t at = held < count ? held++ : count - 1;
        for (; at > 0 && x[i] > x[places[at - 1]]; at--) places[at] = places[at - 1];
        places[at] = (int32_t)i;
    }
    return held;
}

/* Offer the guesses of a level, and choose the paths to follow. */
static void offer_level(offers *o, int64_t level, int64_t num_guesses, const int64_t *guesses,
                        const float *log_probs, int64_t chain_length, int64_t num_nodes, float least,
                        int32_t *origins) {
    float sure[MOST_PATHS * GUESSES];
    int32_t nodes[MOST_PATHS * GUESSES], best[MOST_NODES];
    const int64_t children = o->num_paths * num_guesses;
    for (int64_t i = 0; i < children; i++) {
        const int32_t parent = o->paths[i / num_guesses];
        sure[i] = o->sure[parent] + log_probs[i];
        if (level < chain_length && parent == level && guesses[i] == o->token[level + 1]) {
            /* The chain says so too: its node, as likely as the surer of both makes it. */
            nodes[i] = (int32_t)level + 1;
            if (!(sure[i] > o->sure[level + 1])) sure[i] = o->sure[level + 1];
            o->sure[level + 1] = sure[i];
            continue;
        }
        nodes[i] = (int32_t)o->count;
        o->sure[o->count] = sure[i];
        o->parent[o->count] = parent;
        o->token[o->count++] = guesses[i];
    }
    float bound = least; /* what is not likelier has no children among the likeliest nodes */
    if (o->count > num_nodes) {
        const float last = o->sure[best[largest(o->sure, o->count, num_nodes, best) - 1]];
        if (last > bound) bound = last;
    }
    const int64_t found = largest(sure, children, MOST_PATHS, best);
    for (o->num_paths = 0; o->num_paths < found && sure[best[o->num_paths]] > bound; o->num_paths++) {
        origins[o->num_paths] = best[o->num_paths] / (int32_t)num_guesses;
        o->paths[o->num_paths] = nodes[best[o->num_paths]];
    }
}

/* The likeliest nodes in the order in which they were offered; returns how many. */
static int64_t keep(const offers *o, int64_t num_nodes, float least, int64_t max_nodes, int64_t *tokens,
                    int64_t *parents) {
    int32_t best[MOST_NODES], place_of[MOST_NODES];
    int64_t kept = largest(o->sure, o->count, num_nodes, best), likely = 1;
    while (likely < kept && o->sure[best[likely]] >= least) likely++;
    kept = likely;
    for (int64_t i = 1; i < kept; i++) { /* sort by place */
        const int32_t node = best[i];
        int64_t at = i;
        for (; at > 0 && best[at - 1] > node; at--) best[at] = best[at - 1];
        best[at] = node;
    }
    for (int64_t i = 0; i < kept; i++) {
        place_of[i] = best[i];
        tokens[i] = o->token[best[i]];
        parents[i] = 0;
        for (int64_t above = i - 1; above > 0; above--)
            if (place_of[above] == o->parent[best[i]]) parents[i] = above;
    }
    for (int64_t i = kept; i < max_nodes; i++) tokens[i] = o->token[0], parents[i] = 0;
    return kept;
}

int64_t gorgon_grow_bytes(int64_t hidden, int64_t num_tokens, int64_t requests, int64_t chain_length,
                          int64_t depth, int64_t num_threads) {
    const int64_t rows = requests * MOST_PATHS;
    return gorgon_hydra_bytes(hidden, num_tokens, rows, num_threads) + 64 +
           requests * ((int64_t)sizeof(offers) + 16 * most_offers(chain_length, depth) + 3 * 64) +
           rows * (2 * 4 * hidden + 3 * 8 + 12 * GUESSES + 4) + 4 * requests * num_tokens + 9 * 64;
}

/* Trees of all requests. mixes: of `depth` heads; roots: [requests]; start: [requests, hidden] float; num_nodes,
 * least: [requests], what a tree may have at most, root included, and the log-probability of its least likely
 * node; noise_keys: [requests, depth], of the noise that logits are added, temperatures: [requests] its scale,
 * both NULL where nobody samples; chain_tokens, chain_sure: [requests, chain_length]; tokens, parents:
 * [requests, max_nodes]; grown: [requests], nodes of each tree. */
void gorgon_grow(const matrix *mixes, int64_t depth, const matrix *projection, const uint16_t *embedding,
                 double eps, const int64_t *token_map, int64_t requests, const int64_t *roots,
                 const float *start, const int64_t *num_nodes, const float *least,
                 const uint64_t *noise_keys, const float *temperatures, int64_t chain_length,
                 const int64_t *chain_tokens, const float *chain_sure, int64_t max_nodes, int64_t *tokens,
                 int64_t *parents, int64_t *grown, int64_t num_threads, char *memory) {
    const int64_t hidden = mixes->outputs, most = most_offers(chain_length, depth);
    const int64_t num_guesses = max_nodes - 1 < GUESSES ? max_nodes - 1 : GUESSES;
    const size_t rows = (size_t)requests * MOST_PATHS;
    offers *all = (offers *)take(&memory, (size_t)requests * sizeof(offers));
    float *features[2] = {(float *)take(&memory, rows * 4 * hidden), (float *)take(&memory, rows * 4 * hidden)};
    int64_t *last = (int64_t *)take(&memory, rows * 8), *origins = (int64_t *)take(&memory, rows * 8);
    int64_t *guesses = (int64_t *)take(&memory, rows * 8 * GUESSES);
    float *log_probs = (float *)take(&memory, rows * 4 * GUESSES);
    int64_t *owners = (int64_t *)take(&memory, rows * 8);
    const int64_t num_tokens = projection->outputs;
    float *noise = (float *)take(&memory, 4 * (size_t)(requests * num_tokens));
    int64_t num_rows = requests;
    for (int64_t r = 0; r < requests; r++) {
        offers *o = &all[r];
        o->sure = (float *)take(&memory, 4 * (size_t)most);
        o->parent = (int32_t *)take(&memory, 4 * (size_t)most);
        o->token = (int64_t *)take(&memory, 8 * (size_t)most);
        o->sure[0] = 0.0f, o->parent[0] = 0, o->token[0] = roots[r];
        for (int64_t i = 0; i < chain_length; i++) {
            o->sure[i + 1] = chain_sure[r * chain_length + i];
            o->parent[i + 1] = (int32_t)i;
            o->token[i + 1] = chain_tokens[r * chain_length + i];
        }
        o->count = 1 + chain_length;
        o->num_paths = 1;
        o->paths[0] = 0;
        last[r] = roots[r];
        origins[r] = owners[r] = r;
    }
    for (int64_t level = 0; level < depth && num_rows; level++) {
        if (noise_keys)
            fill_rows(&(noise_job){noise_keys + level, depth, temperatures, token_map, num_tokens, noise},
                      requests, num_threads);
        gorgon_hydra(&mixes[level], projection, embedding, eps, last, level ? features[(level + 1) % 2] : start,
                     origins, num_rows, features[level % 2], noise_keys ? noise : NULL, owners, num_guesses,
                     token_map, guesses, log_probs, num_threads, memory);
        int64_t row = 0;
        num_rows = 0;
        for (int64_t r = 0; r < requests; r++) {
            offers *o = &all[r];
            int32_t from[MOST_PATHS];
            const int64_t first = row;
            row += o->num_paths;
            if (!o->num_paths) continue;
            offer_level(o, level, num_guesses, guesses + first * num_guesses, log_probs + first * num_guesses,
                        chain_length, num_nodes[r], least[r], from);
            for (int64_t i = 0; i < o->num_paths; i++, num_rows++) {
                last[num_rows] = o->token[o->paths[i]];
                origins[num_rows] = first + from[i];
                owners[num_rows] = r;
            }
        }
    }
    for (int64_t r = 0; r < requests; r++)
        grown[r] = keep(&all[r], num_nodes[r], least[r], max_nodes, tokens + r * max_nodes,
                        parents + r * max_nodes);
}
