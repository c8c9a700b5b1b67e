// A libcuda.so.1 that runs kernels on the CPU, so that the real cuda.bindings can be called without
// a driver: what is proven is that our arguments arrive as the driver's C interface takes them.
// Work is done at once, on a held stream when it is let go; captured work is kept in graphs. Kernels
// come from the g++ builds named by DDPM_STEP and DDPM_LOOP.
#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

typedef int Result;
typedef uint64_t Address;
typedef std::function<void()> Work;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };

struct Graph {
    std::vector<Work> work;
    Graph* body = nullptr;
    uint64_t condition = 0;
};
struct Stream {
    Graph* capture = nullptr;
    const volatile uint32_t* word = nullptr;  // held until it is at least the value
    uint32_t value = 0;
    std::vector<Work> waiting;
    bool held() const { return word && *word < value; }
    void wait() {
        while (held()) usleep(1000);
        word = nullptr;
        for (Work& work : waiting) work();
        waiting.clear();
    }
};
struct Event {
    bool timing;
    Stream* stream;
    double at_ms;
};
struct Function {
    std::string name;
};
struct Module {
    bool loop;
};
struct NodeParams {  // CUgraphNodeParams, for a conditional node
    int type, reserved[3];
    uint64_t handle;
    int kind;
    unsigned size;
    Graph** bodies;
    void* context;
};

static void* const CONTEXT = reinterpret_cast<void*>(0xC0);

static void* library(bool loop) {
    static void* step = dlopen(std::getenv("DDPM_STEP"), RTLD_NOW | RTLD_LOCAL);
    static void* head = dlopen(std::getenv("DDPM_LOOP"), RTLD_NOW | RTLD_LOCAL);
    return loop ? head : step;
}
static uint32_t* conditions() {
    return static_cast<uint32_t*>(dlsym(library(true), "ddpm_conditions"));
}
static Result put(Stream* stream, Work work) {
    if (stream->capture) return stream->capture->work.push_back(work), SUCCESS;
    if (stream->held()) return stream->waiting.push_back(work), SUCCESS;
    stream->wait();
    return work(), SUCCESS;
}

#define DRIVER extern "C" Result
DRIVER cuInit(unsigned) { return SUCCESS; }
DRIVER cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
DRIVER cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
DRIVER cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
DRIVER cuDeviceGetName(char* name, int length, int) {
    return std::snprintf(name, length, "Fake GPU"), SUCCESS;
}
DRIVER cuDeviceGetPCIBusId(char* text, int length, int) {
    return std::snprintf(text, length, "0000:01:00.0"), SUCCESS;
}
DRIVER cuDeviceGetAttribute(int* value, int attribute, int) {
    return *value = attribute == 75 ? 9 : 0, SUCCESS;  // compute capability 9.0
}
DRIVER cuDevicePrimaryCtxRetain(void** context, int) { return *context = CONTEXT, SUCCESS; }
DRIVER cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
DRIVER cuCtxSetCurrent(void* context) { return context == CONTEXT ? SUCCESS : INVALID_VALUE; }
DRIVER cuMemAlloc_v2(Address* address, size_t size) {
    *address = reinterpret_cast<Address>(std::aligned_alloc(256, (size + 255) / 256 * 256));
    return SUCCESS;
}
DRIVER cuMemFree_v2(Address address) { return std::free(reinterpret_cast<void*>(address)), SUCCESS; }
DRIVER cuMemAllocHost_v2(void** memory, size_t size) { return *memory = std::malloc(size), SUCCESS; }
DRIVER cuMemFreeHost(void* memory) { return std::free(memory), SUCCESS; }
DRIVER cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t size, Stream* stream) {
    return put(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, size); });
}
DRIVER cuMemcpyDtoHAsync_v2(void* to, Address from, size_t size, Stream* stream) {
    return put(stream, [=] { std::memcpy(to, reinterpret_cast<void*>(from), size); });
}
DRIVER cuMemcpyDtoDAsync_v2(Address to, Address from, size_t size, Stream* stream) {
    return put(stream, [=] {
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    });
}
DRIVER cuMemHostGetDevicePointer_v2(Address* address, void* memory, unsigned flags) {
    return *address = reinterpret_cast<Address>(memory), flags ? INVALID_VALUE : SUCCESS;
}
DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
    return *free = 3000, *total = 4000, SUCCESS;
}
DRIVER cuMemsetD8Async(Address to, unsigned char byte, size_t count, Stream* stream) {
    return put(stream, [=] { std::memset(reinterpret_cast<void*>(to), byte, count); });
}
DRIVER cuMemsetD32Async(Address to, unsigned word, size_t count, Stream* stream) {
    return put(stream, [=] {
        for (size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(to)[i] = word;
    });
}
DRIVER cuStreamCreate(Stream** stream, unsigned flags) {
    return *stream = new Stream, flags == 1 ? SUCCESS : INVALID_VALUE;
}
DRIVER cuStreamDestroy_v2(Stream* stream) { return delete stream, SUCCESS; }
DRIVER cuStreamSynchronize(Stream* stream) {
    return stream->capture ? INVALID_VALUE : (stream->wait(), SUCCESS);
}
DRIVER cuStreamWaitValue32_v2(Stream* stream, Address word, uint32_t value, unsigned flags) {
    stream->word = reinterpret_cast<const volatile uint32_t*>(word);
    stream->value = value;
    return flags == 0 && !stream->capture ? SUCCESS : INVALID_VALUE;  // greater or equal
}
DRIVER cuStreamWaitEvent(Stream*, Event* event, unsigned) {
    return event->stream ? (event->stream->wait(), SUCCESS) : INVALID_VALUE;
}
DRIVER cuEventCreate(Event** event, unsigned flags) {
    *event = new Event{flags == 0, nullptr, 0};
    return flags == 0 || flags == 2 ? SUCCESS : INVALID_VALUE;
}
DRIVER cuEventDestroy_v2(Event* event) { return delete event, SUCCESS; }
DRIVER cuEventRecord(Event* event, Stream* stream) {
    event->stream = stream;
    return put(stream, [=] {
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        event->at_ms = std::chrono::duration<double, std::milli>(now).count();
    });
}
DRIVER cuEventSynchronize(Event* event) {
    return event->stream ? (event->stream->wait(), SUCCESS) : INVALID_VALUE;
}
DRIVER cuEventElapsedTime_v2(float* ms, Event* began, Event* ended) {
    if (!began->timing || !ended->timing || !ended->stream) return INVALID_VALUE;
    return *ms = static_cast<float>(ended->at_ms - began->at_ms), SUCCESS;
}
DRIVER cuModuleLoadData(Module** module, const char* image) {
    if (std::memcmp(image, "\x7f" "ELF", 4)) return INVALID_IMAGE;
    return *module = new Module, SUCCESS;
}
DRIVER cuModuleUnload(Module* module) { return delete module, SUCCESS; }
DRIVER cuModuleGetFunction(Function** function, Module*, const char* name) {
    return *function = new Function{name}, SUCCESS;
}
DRIVER cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    return put(stream, [=] { function(data); });
}
DRIVER cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, unsigned shared, Stream* stream, void** parameters,
                      void** extra) {
    if (gz != 1 || by != 1 || bz != 1 || shared || extra) return INVALID_VALUE;
    const std::string& name = function->name;
    const bool loop = name.find("_loop_") != std::string::npos;
    std::vector<size_t> sizes = {80};
    if (loop || name == "ddpm_start") sizes = {80, 8};
    if (name == "ddpm_collect") sizes = {80, 8, 8};
    if (name == "ddpm_pixels") sizes = {80, 8, 8, 4};
    std::vector<std::string> copies;  // the driver copies parameters when it is called
    for (size_t i = 0; i < sizes.size(); ++i)
        copies.emplace_back(static_cast<char*>(parameters[i]), sizes[i]);
    return put(stream, [=]() mutable {
        typedef int (*Launch)(const char*, unsigned, unsigned, unsigned, void**);
        auto launch = reinterpret_cast<Launch>(dlsym(library(loop), "ddpm_launch"));
        std::vector<void*> pointers;
        for (std::string& copy : copies) pointers.push_back(&copy[0]);
        if (!launch(name.c_str(), gx, gy, bx, pointers.data())) std::abort();
    });
}
DRIVER cuStreamBeginCapture_v2(Stream* stream, int mode) {
    return stream->capture = new Graph, mode == 1 ? SUCCESS : INVALID_VALUE;  // thread-local
}
DRIVER cuStreamBeginCaptureToGraph(Stream* stream, Graph* graph, void*, void*, size_t count,
                                   int mode) {
    return stream->capture = graph, mode == 1 && !count ? SUCCESS : INVALID_VALUE;
}
DRIVER cuStreamEndCapture(Stream* stream, Graph** graph) {
    return *graph = stream->capture, stream->capture = nullptr, SUCCESS;
}
DRIVER cuGraphCreate(Graph** graph, unsigned) { return *graph = new Graph, SUCCESS; }
DRIVER cuGraphConditionalHandleCreate(uint64_t* handle, Graph* graph, void* context,
                                      unsigned initial, unsigned flags) {
    *handle = graph->condition = 5;
    return context == CONTEXT && initial == 1 && flags == 1 ? SUCCESS : INVALID_VALUE;
}
DRIVER cuGraphAddNode_v2(void** node, Graph* graph, void*, void*, size_t count, NodeParams* wanted) {
    const bool is_while = wanted->type == 13 && wanted->kind == 1 && wanted->size == 1;
    if (count || !is_while || wanted->handle != 5 || wanted->context != CONTEXT)
        return INVALID_VALUE;
    graph->body = new Graph;
    wanted->bodies = new Graph*[1]{graph->body};
    return *node = graph, SUCCESS;
}
DRIVER cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long flags) {
    return *executable = graph, flags ? INVALID_VALUE : SUCCESS;
}
DRIVER cuGraphUpload(Graph*, Stream*) { return SUCCESS; }
DRIVER cuGraphLaunch(Graph* graph, Stream* stream) {
    return put(stream, [=] {
        for (Work& work : graph->work) work();
        if (graph->body)
            for (conditions()[graph->condition] = 1; conditions()[graph->condition];)
                for (Work& work : graph->body->work) work();
    });
}
DRIVER cuGraphExecDestroy(Graph*) { return SUCCESS; }
DRIVER cuGraphDestroy(Graph* graph) { return delete graph->body, delete graph, SUCCESS; }
DRIVER cuGetErrorName(int, const char** text) { return *text = "CUDA_ERROR_FAKE", SUCCESS; }
DRIVER cuGetErrorString(int, const char** text) { return *text = "fake", SUCCESS; }

// A driver of CUDA 13.0 has no function that came later.
DRIVER cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* status) {
    static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    if (version <= 13000)
        for (const char* suffix : {"_v2", "WithFlags", ""})
            if (!*function) *function = dlsym(self, (std::string(name) + suffix).c_str());
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
DRIVER cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
