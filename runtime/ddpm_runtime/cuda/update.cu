// The kernels of the device-resident sampling loop. A row is
//
//     ddpm_advance   which row every lane does; x_t, timestep and label into the network's inputs
//     the network
//     ddpm_update    the row itself; marks a lane that came out with NaN or infinity
//
// Grids are (elements or groups of four, lanes); blockIdx.y is the lane. All state is reached through
// `State`, whose addresses are fixed, so the launches can be captured once and replayed. No kernel
// reads what another block of the same launch writes.
//
// DDPM_LOOP builds the other module: ddpm_advance as head of a conditional WHILE node. It is apart
// because drivers without conditional nodes cannot load it.
#include "update.cuh"

DDPM_INLINE u32 thread_number() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <int WIDTH>
DDPM_INLINE void advance(const State& s) {
    const Lane& lane = s.lanes[blockIdx.y];
    const int next = s.progress[blockIdx.y].next;
    const bool active = next < lane.length && s.progress[blockIdx.y].failed < 0;
    const bool first = thread_number() == 0;
    if (first) s.progress[blockIdx.y].row = active ? next : -1;
    if (!active) return;
    const Row& row = lane.rows[next];
    const bool guided = lane.pair_row >= 0 && (row.flags & GUIDED);
    if (first) {
        s.timestep[lane.network_row] = row.timestep;
        if (s.label) s.label[lane.network_row] = lane.label;
        if (guided) {
            s.timestep[lane.pair_row] = row.timestep;
            s.label[lane.pair_row] = s.num_classes;
        }
    }
    const u32 at = WIDTH * thread_number();
    if (at >= s.size) return;
    float x[WIDTH];
    load<WIDTH>(register_of(s, 0, blockIdx.y) + at, x);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) x[e] = mul(row.input_scale, x[e]);
    store<WIDTH>(s.sample + static_cast<u64>(lane.network_row) * s.size + at, x);
    if (guided) store<WIDTH>(s.sample + static_cast<u64>(lane.pair_row) * s.size + at, x);
}

#ifdef DDPM_LOOP

#ifdef __CUDACC_RTC__  // NVRTC knows the function and does not declare it
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
#endif

// The head of the WHILE node's body: decides whether there is another time round.
template <int WIDTH>
DDPM_INLINE void advance_loop(const State& s, u64 condition) {
    if (thread_number() == 0 && blockIdx.y == 0) {
        const int left = *s.rows_left - 1;
        *s.rows_left = left;
        cudaGraphSetConditional(condition, left > 0);
    }
    advance<WIDTH>(s);
}

DDPM_KERNEL ddpm_advance_loop_vector(const State s, u64 condition) {
    advance_loop<4>(s, condition);
}
DDPM_KERNEL ddpm_advance_loop_scalar(const State s, u64 condition) {
    advance_loop<1>(s, condition);
}

#else

template <int WIDTH>
DDPM_INLINE void update(const State& s) {
    const int row_number = s.progress[blockIdx.y].row;
    if (row_number < 0) return;
    if (thread_number() == 0) s.progress[blockIdx.y].next = row_number + 1;
    const u32 at = WIDTH * thread_number();
    if (at >= s.size) return;
    const Lane& lane = s.lanes[blockIdx.y];
    const Row& row = lane.rows[row_number];
    if (!update_elements<WIDTH>(s, lane, row, blockIdx.y, row_number, at))
        s.progress[blockIdx.y].failed = row_number;  // every writer writes the same
}

DDPM_KERNEL ddpm_advance_vector(const State s) { advance<4>(s); }
DDPM_KERNEL ddpm_advance_scalar(const State s) { advance<1>(s); }
DDPM_KERNEL ddpm_update_vector(const State s) { update<4>(s); }
DDPM_KERNEL ddpm_update_scalar(const State s) { update<1>(s); }

// x_T is draw 0 times the program's initial scale, or what was given; history is zero
DDPM_KERNEL ddpm_start(const State s, const int* lanes) {
    const u32 lane_number = lanes[blockIdx.y];
    const Lane& lane = s.lanes[lane_number];
    const u32 at = thread_number();
    if (at >= s.size) return;
    float x[1];
    if (lane.initial) {
        x[0] = lane.initial[at];
    } else {
        draw_noise<1>(lane, 0, at, x);
        x[0] = mul(x[0], lane.initial_scale);
    }
    if (lane.mask) restore_known<1>(lane, 0, lane.initial_signal, lane.initial_noise, at, x);
    register_of(s, 0, lane_number)[at] = x[0];
    for (int j = 1; j < lane.registers; ++j) register_of(s, j, lane_number)[at] = 0.0f;
}

// x_t of some lanes, one after the other, (C, H, W) float32
DDPM_KERNEL ddpm_collect(const State s, const int* lanes, float* out) {
    const float* x = register_of(s, 0, lanes[blockIdx.y]);
    const u32 i = thread_number();
    if (i < s.size) out[static_cast<u64>(blockIdx.y) * s.size + i] = x[i];
}

// images.to_uint8 of some lanes: rint((clip(x, −1, 1) + 1) · 127.5), (C, H, W) → (H, W, C)
DDPM_KERNEL ddpm_pixels(const State s, const int* lanes, u8* out, u32 channels) {
    const float* x = register_of(s, 0, lanes[blockIdx.y]);
    const u32 area = s.size / channels;
    const u32 i = thread_number();
    if (i >= s.size) return;
    const float value = x[(i % channels) * area + i / channels];
    const float level = mul(add(clip(value, 1.0f), 1.0f), 127.5f);
    const int whole = level == level ? round_half_even(level) : 0;  // NaN is black
    out[static_cast<u64>(blockIdx.y) * s.size + i] = static_cast<u8>(whole);
}

#endif
