// Noise and elementary functions that give the same bits as noise.py and portable_math.py.
//
// Every float operation is named and rounded on its own (never contracted into a fused
// multiply-add, never flushed to zero), so NumPy float32, g++ and every GPU agree bit for bit.
// Compiled by NVRTC and nvcc as it is, and by g++ through host_shim.h.
#pragma once

#ifdef DDPM_ON_HOST
#include "host_shim.h"
#else
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DDPM_INLINE __device__ __forceinline__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define DDPM_REGISTERS 64  // a Turing multiprocessor runs 1024 threads: 64 registers fill it
#else
#define DDPM_REGISTERS 48
#endif
#define DDPM_KERNEL extern "C" __global__ void __maxnreg__(DDPM_REGISTERS)
DDPM_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
DDPM_INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
DDPM_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
DDPM_INLINE float square_root(float a) { return __fsqrt_rn(a); }
DDPM_INLINE float from_int(int a) { return __int2float_rn(a); }
DDPM_INLINE int round_half_even(float a) { return __float2int_rn(a); }
DDPM_INLINE float round_down(float a) { return floorf(a); }
DDPM_INLINE u32 bits_of(float a) { return __float_as_uint(a); }
DDPM_INLINE float float_of(u32 a) { return __uint_as_float(a); }
DDPM_INLINE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
DDPM_INLINE void load4(const float* from, float to[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
DDPM_INLINE void store4(float* to, const float from[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
#endif

// noise.philox4x32: Salmon et al., SC'11
DDPM_INLINE void philox4x32(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1, u32 out[4]) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u32 high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const u32 high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// Horner's rule, one power further: total·x + coefficient, two roundings
DDPM_INLINE float horner(float total, float x, float coefficient) {
    return add(mul(total, x), coefficient);
}

// portable_math.log_unit: normal numbers in (0, 1]
DDPM_INLINE float log_unit(float u) {
    const u32 bits = bits_of(u);
    int exponent = static_cast<int>(bits >> 23) - 126;
    const float mantissa = float_of((bits & 0x007FFFFFu) | 0x3F000000u);
    const bool low = mantissa < 0.707106781186547524f;
    exponent -= low;
    const float m = sub(low ? add(mantissa, mantissa) : mantissa, 1.0f);
    const float square = mul(m, m);
    float fit = 7.0376836292e-2f;
    fit = horner(fit, m, -1.1514610310e-1f);
    fit = horner(fit, m, 1.1676998740e-1f);
    fit = horner(fit, m, -1.2420140846e-1f);
    fit = horner(fit, m, 1.4249322787e-1f);
    fit = horner(fit, m, -1.6668057665e-1f);
    fit = horner(fit, m, 2.0000714765e-1f);
    fit = horner(fit, m, -2.4999993993e-1f);
    fit = horner(fit, m, 3.3333331174e-1f);
    const float power = from_int(exponent);
    float tail = add(mul(mul(fit, m), square), mul(power, -2.12194440e-4f));
    tail = add(tail, mul(-0.5f, square));
    return add(add(m, tail), mul(power, 0.693359375f));
}

// portable_math.sincos_turn: 2π·turn/2²⁴ for turn < 2²⁴
DDPM_INLINE void sincos_turn(u32 turn, float* sine, float* cosine) {
    const u32 quadrant = (turn + (1u << 21)) >> 22;
    const int remainder = static_cast<int>(turn) - static_cast<int>(quadrant << 22);
    const float angle = mul(from_int(remainder), 3.7450704e-7f);
    const float square = mul(angle, angle);
    float odd = horner(-1.9515295891e-4f, square, 8.3321608736e-3f);
    odd = horner(odd, square, -1.6666654611e-1f);
    odd = add(mul(mul(odd, square), angle), angle);
    float even = horner(2.443315711809948e-5f, square, -1.388731625493765e-3f);
    even = horner(even, square, 4.166664568298827e-2f);
    even = add(sub(1.0f, mul(0.5f, square)), mul(even, mul(square, square)));
    const float s = quadrant & 1u ? even : odd, c = quadrant & 1u ? odd : even;
    *sine = quadrant & 2u ? -s : s;
    *cosine = (quadrant + 1u) & 2u ? -c : c;
}

// portable_math.exp: clamped to [−87, 88]; NaN stays NaN
DDPM_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float whole = round_down(add(mul(x, 1.44269504088896341f), 0.5f));
    const float r = sub(sub(x, mul(whole, 0.693359375f)), mul(whole, -2.12194440e-4f));
    const float square = mul(r, r);
    float fit = 1.9875691500e-4f;
    fit = horner(fit, r, 1.3981999507e-3f);
    fit = horner(fit, r, 8.3334519073e-3f);
    fit = horner(fit, r, 4.1665795894e-2f);
    fit = horner(fit, r, 1.6666665459e-1f);
    fit = horner(fit, r, 5.0000001201e-1f);
    const float mantissa = add(add(mul(fit, square), r), 1.0f);
    const int power = whole == whole ? round_half_even(whole) : 0;
    return mul(mantissa, float_of(static_cast<u32>(power + 127) << 23));
}

// noise._box_muller: two normals from two words
DDPM_INLINE void box_muller(u32 a, u32 b, float out[2]) {
    // an odd multiple of 2⁻²⁴: never 0, never 1, exact in float32
    const float uniform = mul(from_int(static_cast<int>((a >> 8) | 1u)), 5.9604644775390625e-8f);
    const float radius = square_root(mul(-2.0f, log_unit(uniform)));
    float sine, cosine;
    sincos_turn(b >> 8, &sine, &cosine);
    out[0] = mul(radius, cosine);
    out[1] = mul(radius, sine);
}

// noise.noise: the four normals of one quad of positions
DDPM_INLINE void normal_quad(u64 seed, u64 index, u32 draw, u32 quad, float z[4]) {
    u32 words[4];
    philox4x32(quad, draw, static_cast<u32>(index), static_cast<u32>(index >> 32),
               static_cast<u32>(seed), static_cast<u32>(seed >> 32), words);
    box_muller(words[0], words[1], z);
    box_muller(words[2], words[3], z + 2);
}
