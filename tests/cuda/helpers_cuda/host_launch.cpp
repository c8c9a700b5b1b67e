// Runs the kernels on a CPU, one thread after another, by name and with the driver's parameters.
#include <cstddef>

#include "update.cu"

extern "C" {
u32 ddpm_conditions[64];

u32 ddpm_sizes(u32* out) {
    out[0] = sizeof(Row), out[1] = sizeof(Lane), out[2] = sizeof(Progress), out[3] = sizeof(State);
    return 4;
}
}

#define OFFSET(type, field) \
    if (!std::strcmp(name, #type "." #field)) return offsetof(type, field);
extern "C" i64 ddpm_offset(const char* name) {
    OFFSET(Row, timestep) OFFSET(Row, input_scale) OFFSET(Row, x0_from_x) OFFSET(Row, x0_from_m)
    OFFSET(Row, clip) OFFSET(Row, log_sigma_min) OFFSET(Row, log_sigma_max) OFFSET(Row, signal)
    OFFSET(Row, noise) OFFSET(Row, flags) OFFSET(Row, unused) OFFSET(Row, weights)
    OFFSET(Lane, rows) OFFSET(Lane, seed) OFFSET(Lane, index) OFFSET(Lane, known)
    OFFSET(Lane, mask) OFFSET(Lane, initial) OFFSET(Lane, length) OFFSET(Lane, registers)
    OFFSET(Lane, network_row) OFFSET(Lane, pair_row) OFFSET(Lane, label)
    OFFSET(Lane, guidance_scale) OFFSET(Lane, initial_scale) OFFSET(Lane, initial_signal)
    OFFSET(Lane, initial_noise) OFFSET(Lane, unused)
    OFFSET(Progress, next) OFFSET(Progress, row) OFFSET(Progress, failed) OFFSET(Progress, unused)
    OFFSET(State, lanes) OFFSET(State, progress) OFFSET(State, registers) OFFSET(State, sample)
    OFFSET(State, timestep) OFFSET(State, label) OFFSET(State, prediction)
    OFFSET(State, rows_left) OFFSET(State, capacity) OFFSET(State, size)
    OFFSET(State, prediction_size) OFFSET(State, num_classes)
    return -1;
}

template <typename Call>
static int over_grid(u32 blocks_x, u32 blocks_y, u32 threads, Call call) {
    gridDim = {blocks_x, blocks_y, 1}, blockDim = {threads, 1, 1};
    for (u32 y = 0; y < blocks_y; ++y)
        for (u32 x = 0; x < blocks_x; ++x)
            for (u32 t = 0; t < threads; ++t) {
                blockIdx = {x, y, 0}, threadIdx = {t, 0, 0};
                call();
            }
    return 1;
}

#define ARGUMENT(type, number) (*static_cast<const type*>(parameters[number]))
#define POINTER(type, number) (reinterpret_cast<type*>(ARGUMENT(u64, number)))
#define KERNEL(kernel, ...)            \
    if (!std::strcmp(name, #kernel))   \
        return over_grid(blocks_x, blocks_y, threads, [&] { kernel(__VA_ARGS__); });

// 1 if this library has the kernel
extern "C" int ddpm_launch(const char* name, u32 blocks_x, u32 blocks_y, u32 threads,
                           void** parameters) {
    const State& s = ARGUMENT(State, 0);
#ifdef DDPM_LOOP
    KERNEL(ddpm_advance_loop_vector, s, ARGUMENT(u64, 1))
    KERNEL(ddpm_advance_loop_scalar, s, ARGUMENT(u64, 1))
#else
    KERNEL(ddpm_advance_vector, s)
    KERNEL(ddpm_advance_scalar, s)
    KERNEL(ddpm_update_vector, s)
    KERNEL(ddpm_update_scalar, s)
    KERNEL(ddpm_start, s, POINTER(const int, 1))
    KERNEL(ddpm_collect, s, POINTER(const int, 1), POINTER(float, 2))
    KERNEL(ddpm_pixels, s, POINTER(const int, 1), POINTER(u8, 2), ARGUMENT(u32, 3))
#endif
    return 0;
}

#ifndef DDPM_LOOP
extern "C" void ddpm_normals(u64 seed, u64 index, u32 draw, u32 quads, float* out) {
    for (u32 quad = 0; quad < quads; ++quad) normal_quad(seed, index, draw, quad, out + 4 * quad);
}
extern "C" void ddpm_philox(const u32* counter, const u32* key, u32* out) {
    philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1], out);
}
extern "C" void ddpm_exponentials(const float* x, u32 count, float* out) {
    for (u32 i = 0; i < count; ++i) out[i] = exponential(x[i]);
}
#endif
