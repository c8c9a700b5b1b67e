// networks.smooth_network on a device, every operation rounded on its own: the same bits as NumPy.
extern "C" __global__ void test_network(const float* sample, const float* timestep,
                                        const long long* label, float* prediction, unsigned size,
                                        unsigned area, unsigned learned) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (i >= size) return;
    const float* x = sample + static_cast<unsigned long long>(row) * size;
    const unsigned turned = i / area * area + (area - 1 - i % area);  // rows and columns reversed
    const float t = __fmul_rn(timestep[row], 1e-3f);
    float answer = __fadd_rn(__fmul_rn(x[i], 0.9f), __fmul_rn(__fmul_rn(x[turned], 0.1f), t));
    answer = __fadd_rn(answer, __fmul_rn(t, 0.05f));
    if (label) {
        const float number = __int2float_rn(static_cast<int>(label[row]));
        answer = __fadd_rn(answer, __fmul_rn(number, 0.02f));
    }
    float* out = prediction + static_cast<unsigned long long>(row) * size * (learned ? 2 : 1);
    out[i] = answer;
    if (learned) {
        float v = __fsub_rn(0.3f, __fmul_rn(answer, 0.5f));
        v = v < -1.0f ? -1.0f : v;
        out[size + i] = v > 1.0f ? 1.0f : v;
    }
}
