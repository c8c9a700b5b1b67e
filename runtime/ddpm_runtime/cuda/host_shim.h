// The CUDA words the kernels use, for g++: the same source runs on a CPU, one thread at a time.
// Build with -ffp-contract=off; see tests/cuda/helpers_cuda/host_build.py.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;
#define DDPM_INLINE static inline
#define DDPM_KERNEL extern "C" void

struct Index3 {
    u32 x, y, z;
};
static thread_local Index3 blockIdx, threadIdx, blockDim, gridDim;

// where conditional nodes keep their values, by handle
extern "C" u32 ddpm_conditions[64];
DDPM_INLINE void cudaGraphSetConditional(u64 handle, u32 value) { ddpm_conditions[handle] = value; }

DDPM_INLINE float add(float a, float b) { return a + b; }
DDPM_INLINE float sub(float a, float b) { return a - b; }
DDPM_INLINE float mul(float a, float b) { return a * b; }
DDPM_INLINE float square_root(float a) { return std::sqrt(a); }
DDPM_INLINE float from_int(int a) { return static_cast<float>(a); }
DDPM_INLINE int round_half_even(float a) { return static_cast<int>(std::nearbyint(a)); }
DDPM_INLINE float round_down(float a) { return std::floor(a); }
DDPM_INLINE u32 bits_of(float a) {
    u32 bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
}
DDPM_INLINE float float_of(u32 a) {
    float value;
    std::memcpy(&value, &a, sizeof value);
    return value;
}
DDPM_INLINE u32 multiply_high(u32 a, u32 b) {
    return static_cast<u32>((static_cast<u64>(a) * b) >> 32);
}
// a 16-byte access on the device; here its alignment is what -fsanitize=alignment checks
struct alignas(16) Float4 {
    float value[4];
};
DDPM_INLINE void load4(const float* from, float to[4]) {
    const Float4 four = *reinterpret_cast<const Float4*>(from);
    std::memcpy(to, four.value, sizeof four);
}
DDPM_INLINE void store4(float* to, const float from[4]) {
    Float4 four;
    std::memcpy(four.value, from, sizeof four);
    *reinterpret_cast<Float4*>(to) = four;
}
