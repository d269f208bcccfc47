// Metal's vocabulary in CUDA, as far as the bodies use it; kernels/emulator/runtime/metal.hpp is its twin for g++.
// Stands at global scope before MLX's kernel.
#define inline_function __device__ __forceinline__
// Of array declarations alone. A helper takes a threadgroup array as a template parameter.
#define threadgroup __shared__
#define DEVICE_POINTER(T, POINTER) ((const T*)(POINTER))
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

template <typename To, typename From>
inline_function To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  union {
    From from;
    To to;
  } both;
  both.from = from;
  return both.to;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline_function mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline_function void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline_function void simdgroup_barrier(mem_flags) { __syncwarp(); }

enum kernel_memory_order { memory_order_relaxed };
template <typename T>
struct kernel_atomic {
  T value;
};
typedef kernel_atomic<uint> atomic_uint;
typedef kernel_atomic<int> atomic_int;
#define UPDATE(NAME, FUNCTION)                                                            \
  template <typename T, typename U>                                                       \
  inline_function T NAME(kernel_atomic<T>* cell, U operand, kernel_memory_order) {        \
    return FUNCTION(&cell->value, T(operand));                                            \
  }
UPDATE(atomic_fetch_add_explicit, atomicAdd)
UPDATE(atomic_fetch_max_explicit, atomicMax)
UPDATE(atomic_fetch_min_explicit, atomicMin)
UPDATE(atomic_fetch_or_explicit, atomicOr)
#undef UPDATE
template <typename T, typename U>
inline_function void atomic_store_explicit(kernel_atomic<T>* cell, U operand, kernel_memory_order) {
  *(volatile T*)&cell->value = T(operand);
}
template <typename T>
inline_function T atomic_load_explicit(const kernel_atomic<T>* cell, kernel_memory_order) {
  return *(const volatile T*)&cell->value;
}

namespace metal {
constexpr unsigned ALL_LANES = 0xffffffffu;
#define REDUCTION(NAME, EXPRESSION)                            \
  template <typename T>                                        \
  inline_function T NAME(T a) {                                \
    for (int step = 16; step; step >>= 1) {                    \
      T b = __shfl_xor_sync(ALL_LANES, a, step);               \
      a = EXPRESSION;                                          \
    }                                                          \
    return a;                                                  \
  }
REDUCTION(simd_sum, a + b)
REDUCTION(simd_max, (b > a ? b : a))
REDUCTION(simd_min, (b < a ? b : a))
REDUCTION(simd_or, a | b)
#undef REDUCTION
template <typename T>
inline_function T simd_shuffle(T value, ushort lane) {
  return __shfl_sync(ALL_LANES, value, lane);
}
template <typename T>
inline_function T simd_broadcast(T value, ushort lane) {
  return __shfl_sync(ALL_LANES, value, lane);
}
template <typename T>
inline_function T simd_shuffle_xor(T value, ushort mask) {
  return __shfl_xor_sync(ALL_LANES, value, mask);
}
template <typename T>
inline_function T simd_shuffle_down(T value, ushort n) {
  return __shfl_down_sync(ALL_LANES, value, n);
}
template <typename T>
inline_function T simd_shuffle_up(T value, ushort n) {
  return __shfl_up_sync(ALL_LANES, value, n);
}
inline_function uint lane_index() {
  uint lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
template <typename T>
inline_function T simd_prefix_inclusive_sum(T value) {
  for (uint step = 1; step < 32; step <<= 1) {
    T other = __shfl_up_sync(ALL_LANES, value, step);
    if (lane_index() >= step) value = value + other;
  }
  return value;
}
template <typename T>
inline_function T simd_prefix_exclusive_sum(T value) {
  T sum = __shfl_up_sync(ALL_LANES, simd_prefix_inclusive_sum(value), 1);
  return lane_index() ? sum : T(0);
}
inline_function bool simd_any(bool value) { return __any_sync(ALL_LANES, value); }

inline_function float exp(float x) { return expf(x); }
inline_function float exp2(float x) { return exp2f(x); }
inline_function float log(float x) { return logf(x); }
inline_function float log2(float x) { return log2f(x); }
inline_function float sqrt(float x) { return sqrtf(x); }
inline_function float rsqrt(float x) { return rsqrtf(x); }
inline_function float sin(float x) { return sinf(x); }
inline_function float cos(float x) { return cosf(x); }
inline_function float tanh(float x) { return tanhf(x); }
inline_function float pow(float x, float y) { return powf(x, y); }
inline_function float floor(float x) { return floorf(x); }
inline_function float ceil(float x) { return ceilf(x); }
inline_function float rint(float x) { return rintf(x); }
inline_function float abs(float x) { return fabsf(x); }
inline_function float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline_function bool isnan(float x) { return x != x; }
inline_function float max(float a, float b) { return fmaxf(a, b); }
inline_function float min(float a, float b) { return fminf(a, b); }
inline_function int max(int a, int b) { return a > b ? a : b; }
inline_function int min(int a, int b) { return a < b ? a : b; }
inline_function uint max(uint a, uint b) { return a > b ? a : b; }
inline_function uint min(uint a, uint b) { return a < b ? a : b; }
template <typename T>
inline_function T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline_function T select(T no, T yes, bool condition) {
  return condition ? yes : no;
}
inline_function uint popcount(uint x) { return __popc(x); }
}  // namespace metal
