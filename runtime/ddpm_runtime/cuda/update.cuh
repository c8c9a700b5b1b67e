// One row of a sampler program for a few elements: what HostLanes.advance does, in its order.
//
//     m    = network(input_scale · r0, timestep, label)
//     x0   = clip(x0_from_x · r0 + x0_from_m · m)
//     r'_i = Σ_j W[i, j] · r_j  +  W[i, m] · m  +  W[i, x0] · x0  +  W[i, z] · z
//
// The structures are mirrored field by field in layout.py; a test compares every offset.
#pragma once
#include "portable_math.cuh"

enum { MAX_REGISTERS = 4, FROM_M = MAX_REGISTERS, FROM_X0, FROM_Z, TERMS };
enum { EVALUATES = 1, GUIDED = 2, DRAWS = 4 };
enum : u32 { KNOWN_DRAWS = 0x80000000u };  // the known part's draws, which no row uses

struct Row {  // one row of a program table, 160 bytes
    float timestep, input_scale, x0_from_x, x0_from_m;
    float clip, log_sigma_min, log_sigma_max;
    float signal, noise;  // levels after this row
    u32 flags;
    u32 unused[2];
    float weights[MAX_REGISTERS][TERMS];  // columns r_0 … r_3, m, x0, z
};

struct Lane {  // written by the host between chunks, 88 bytes
    const Row* rows;
    u64 seed, index;
    const float* known;    // inpainting: the given part of the image, and where it is given (1) or
    const float* mask;     // not (0); null when nothing is
    const float* initial;  // r0 before the first row; null for noise
    int length;            // rows of the program; 0 marks a free lane
    int registers;
    int network_row;
    int pair_row;  // the row that is evaluated without a label; −1 without guidance
    int label;
    float guidance_scale, initial_scale;
    float initial_signal, initial_noise;  // levels before the first row
    int unused;
};

struct Progress {  // written by the kernels
    int next;      // the row to do next
    int row;       // the row being done, −1 when idle
    int failed;    // the first row that left NaN or infinity in r0, −1 when none
    int unused;
};

struct State {  // everything a kernel works on: addresses that never change while a graph lives
    const Lane* lanes;
    Progress* progress;
    float* registers;  // [register][lane][element]
    float* sample;
    float* timestep;
    i64* label;  // null for an unconditional network
    const float* prediction;
    int* rows_left;  // of this chunk; counted by the conditional loop alone
    u32 capacity, size, prediction_size, num_classes;
};

// A thread does WIDTH consecutive elements: four at once, by 16-byte accesses, where the size of an
// image is divisible by four; else one.
template <int WIDTH>
DDPM_INLINE void load(const float* from, float to[WIDTH]) {
    if (WIDTH == 4) {
        load4(from, to);
    } else {
        to[0] = from[0];
    }
}

template <int WIDTH>
DDPM_INLINE void store(float* to, const float from[WIDTH]) {
    if (WIDTH == 4) {
        store4(to, from);
    } else {
        to[0] = from[0];
    }
}

// Noise of elements at … at + WIDTH − 1: noise comes four elements at a time.
template <int WIDTH>
DDPM_INLINE void draw_noise(const Lane& lane, u32 draw, u32 at, float z[WIDTH]) {
    float quad[4];
    normal_quad(lane.seed, lane.index, draw, at / 4, quad);
    if (WIDTH == 4) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) z[e] = quad[e];
    } else {
        const float low = at & 1u ? quad[1] : quad[0], high = at & 1u ? quad[3] : quad[2];
        z[0] = at & 2u ? high : low;
    }
}

DDPM_INLINE float* register_of(const State& s, u32 number, u32 lane) {
    return s.registers + (static_cast<u64>(number) * s.capacity + lane) * s.size;
}

DDPM_INLINE bool is_finite(float a) { return (bits_of(a) & 0x7F800000u) != 0x7F800000u; }

// guidance.guide: uncond + g · (cond − uncond)
DDPM_INLINE float guide(float conditional, float unconditional, float guidance_scale) {
    return add(mul(sub(conditional, unconditional), guidance_scale), unconditional);
}

// NumPy's minimum(maximum(x, −bound), bound): NaN passes through
DDPM_INLINE float clip(float x, float bound) {
    x = x < -bound ? -bound : x;
    return x > bound ? bound : x;
}

// sum += weight · term; a weight of zero adds nothing, not even NaN
template <int WIDTH>
DDPM_INLINE void accumulate(float sum[WIDTH], float weight, const float term[WIDTH]) {
    if (weight != 0.0f) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) sum[e] = add(sum[e], mul(weight, term[e]));
    }
}

// Σ_j W[i, j] · r_j + W[i, m] · m + W[i, x0] · x0, in this order from +0; z comes last
template <int WIDTH>
DDPM_INLINE void weighted_sum(const float* weights, const float history[MAX_REGISTERS][WIDTH],
                              const float m[WIDTH], const float x0[WIDTH], float sum[WIDTH]) {
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) sum[e] = add(mul(weights[0], history[0][e]), 0.0f);
#pragma unroll
    for (int j = 1; j < MAX_REGISTERS; ++j) accumulate<WIDTH>(sum, weights[j], history[j]);
    accumulate<WIDTH>(sum, weights[FROM_M], m);
    accumulate<WIDTH>(sum, weights[FROM_X0], x0);
}

// The network's answer, guided if the row is.
template <int WIDTH>
DDPM_INLINE void read_prediction(const State& s, const Lane& lane, u32 flags, u32 at,
                                 float m[WIDTH]) {
    load<WIDTH>(s.prediction + static_cast<u64>(lane.network_row) * s.prediction_size + at, m);
    if (lane.pair_row >= 0 && (flags & GUIDED)) {
        float unconditional[WIDTH];
        load<WIDTH>(s.prediction + static_cast<u64>(lane.pair_row) * s.prediction_size + at,
                    unconditional);
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) m[e] = guide(m[e], unconditional[e], lane.guidance_scale);
    }
}

// z times the deviation the network chose: exp(low + (v/2 + ½) · (high − low))
template <int WIDTH>
DDPM_INLINE void learn_noise(const State& s, const Lane& lane, const Row& row, u32 at,
                             float z[WIDTH]) {
    float v[WIDTH] = {};  // a row without an answer has nothing to learn: span is 0
    if (row.flags & EVALUATES)
        load<WIDTH>(
            s.prediction + static_cast<u64>(lane.network_row) * s.prediction_size + s.size + at,
            v);
    const float span = sub(row.log_sigma_max, row.log_sigma_min);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
        const float share = mul(add(mul(v[e], 0.5f), 0.5f), span);
        z[e] = mul(exponential(add(row.log_sigma_min, share)), z[e]);
    }
}

// lanes.Known: x = mask · (signal · known + noise · z) + (1 − mask) · x, z of draw 2³¹ + rows done
template <int WIDTH>
DDPM_INLINE void restore_known(const Lane& lane, u32 rows_done, float signal, float noise, u32 at,
                               float x[WIDTH]) {
    float known[WIDTH], mask[WIDTH], z[WIDTH];
    draw_noise<WIDTH>(lane, KNOWN_DRAWS + rows_done, at, z);
    load<WIDTH>(lane.known + at, known);
    load<WIDTH>(lane.mask + at, mask);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
        const float at_level = add(mul(signal, known[e]), mul(noise, z[e]));
        x[e] = add(mul(mask[e], at_level), mul(sub(1.0f, mask[e]), x[e]));
    }
}

// One row of elements at … at + WIDTH − 1; returns whether x_t stayed finite.
template <int WIDTH>
DDPM_INLINE bool update_elements(const State& s, const Lane& lane, const Row& row, u32 lane_number,
                                 u32 row_number, u32 at) {
    float history[MAX_REGISTERS][WIDTH] = {}, m[WIDTH] = {}, x0[WIDTH], z[WIDTH] = {}, sum[WIDTH];
    if (row.flags & DRAWS) draw_noise<WIDTH>(lane, row_number + 1u, at, z);
#pragma unroll
    for (int j = 0; j < MAX_REGISTERS; ++j)
        if (j < lane.registers) load<WIDTH>(register_of(s, j, lane_number) + at, history[j]);
    if (row.flags & EVALUATES) read_prediction<WIDTH>(s, lane, row.flags, at, m);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e)
        x0[e] = clip(add(mul(row.x0_from_x, history[0][e]), mul(row.x0_from_m, m[e])), row.clip);
#pragma unroll 1
    for (int i = lane.registers - 1; i > 0; --i) {
        weighted_sum<WIDTH>(row.weights[i], history, m, x0, sum);
        accumulate<WIDTH>(sum, row.weights[i][FROM_Z], z);
        store<WIDTH>(register_of(s, i, lane_number) + at, sum);
    }
    weighted_sum<WIDTH>(row.weights[0], history, m, x0, sum);
    const bool learns_variance = s.prediction_size != s.size;
    if (learns_variance && (row.flags & DRAWS)) learn_noise<WIDTH>(s, lane, row, at, z);
    accumulate<WIDTH>(sum, row.weights[0][FROM_Z], z);
    if (lane.mask) restore_known<WIDTH>(lane, row_number + 1u, row.signal, row.noise, at, sum);
    store<WIDTH>(register_of(s, 0, lane_number) + at, sum);
    bool finite = true;
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) finite = finite && is_finite(sum[e]);
    return finite;
}
