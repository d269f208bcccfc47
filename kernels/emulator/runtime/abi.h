// What the runtime and a compiled kernel share: the attributes of a thread, and the calls that the shim makes.
#pragma once
#ifdef EMULATOR_SYNTAX_ONLY  // clang without a C library
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __SIZE_TYPE__ size_t;
#else
#include <stddef.h>
#include <stdint.h>
#endif

struct uint3 {
  uint32_t x, y, z;
};

// Named as Metal's attributes, so that the wrapper can pass `attributes->NAME` for each attribute that MLX's signature asks for.
struct Attributes {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup;
  uint3 threads_per_grid, grid_size, grid_origin, threadgroups_per_grid;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint32_t threads_per_simdgroup, thread_execution_width;
  uint32_t thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
  uint32_t quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};

struct Buffer {
  void* data;
  uint64_t bytes;
  uint32_t element;      // bytes of one element: the grain of the shadow memory
  uint32_t output;       // may be written, and must be, in whole
  uint32_t initialised;  // an output that MLX fills beforehand (init_value)
  uint32_t padding;
  const char* name;
};

struct Options {
  uint64_t seed;               // of the schedule; 0: always the thread that became ready last
  uint32_t checked;            // shadow memory on
  uint32_t threadgroup_limit;  // bytes of threadgroup memory
};

typedef void (*Entry)(void** buffers, const Attributes* attributes);

enum MemoryKind : unsigned { DEVICE_MEMORY = 1, THREADGROUP_MEMORY = 2 };
enum AtomicKind { ATOMIC_LOAD, ATOMIC_STORE, ATOMIC_UPDATE };

extern "C" {
void emulator_threadgroup_barrier(unsigned memory, int line);
void emulator_simdgroup_barrier(unsigned memory, int line);
// Hands `value` to the other lanes of the simdgroup; returns the mask of the lanes that took part.
uint32_t emulator_exchange(int operation, const void* value, size_t bytes, uint64_t (*lanes)[2], int line);
void* emulator_threadgroup_array(int id, size_t bytes, size_t element, const char* name);
void emulator_atomic(const void* address, size_t bytes, int kind);
uint32_t emulator_lane();
}
