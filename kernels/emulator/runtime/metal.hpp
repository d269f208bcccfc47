// The Metal vocabulary that a kernel body may use, for g++ and, syntax only, for clang.
// It covers what Metal and CUDA share (kernels/cuda/shim.h is its twin); anything else fails to compile, on purpose.
#pragma once
#include "abi.h"

#ifdef EMULATOR_SYNTAX_ONLY
// clang knows address spaces: with them it refuses the pointers that Apple's compiler refuses and g++ does not.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define THREADGROUP_ARRAY(T, NAME, DIMS) static threadgroup T NAME DIMS
#else
#define device
#define constant
#define threadgroup  // of pointers; array declarations are rewritten to THREADGROUP_ARRAY
#define THREADGROUP_ARRAY(T, NAME, DIMS) \
  T(&NAME) DIMS = *reinterpret_cast<T(*) DIMS>(emulator_threadgroup_array(__COUNTER__, sizeof(T DIMS), sizeof(T), #NAME))
#endif
#define thread
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
// The emulator's own code inside the kernel's object: no shadow memory for it.
#define UNWATCHED __attribute__((no_sanitize("thread")))

typedef uint32_t uint;
typedef uint16_t ushort;
typedef uint8_t uchar;
typedef uint64_t ulong;

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- 16-bit floats. Every conversion is explicit: CUDA's __half and __nv_bfloat16 need that.
namespace emulator {
inline float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return as_type<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return as_type<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  float subnormal = float(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
inline uint16_t float_to_half(float value) {  // rounds to nearest, ties to even
  uint32_t bits = as_type<uint32_t>(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) return sign | uint16_t(as_type<uint32_t>(as_type<float>(bits) + 0.5f) - 0x3f000000);
  return sign | uint16_t((bits + 0xc8000fff + (bits >> 13 & 1)) >> 13);
}
inline float bfloat_to_float(uint16_t bits) { return as_type<float>(uint32_t(bits) << 16); }
inline uint16_t float_to_bfloat(float value) {
  uint32_t bits = as_type<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 64;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <float (*UP)(uint16_t), uint16_t (*DOWN)(float)>
struct Small {
  uint16_t bits;
  Small() = default;
  explicit Small(float value) : bits(DOWN(value)) {}
  explicit operator float() const { return UP(bits); }
};
}  // namespace emulator

#ifdef EMULATOR_SYNTAX_ONLY
typedef _Float16 half;
typedef __bf16 bfloat;
#else
typedef emulator::Small<emulator::half_to_float, emulator::float_to_half> half;
typedef emulator::Small<emulator::bfloat_to_float, emulator::float_to_bfloat> bfloat;
#endif
// Four words: what a load of 16 bytes brings.
#ifdef EMULATOR_SYNTAX_ONLY
typedef uint uint4 __attribute__((ext_vector_type(4)));
#else
struct alignas(16) uint4 {
  uint x, y, z, w;
};
#endif
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {
// ---- Barriers. The default argument is the line of the call.
#define LINE int line = __builtin_LINE()
enum class mem_flags : unsigned { mem_none = 0, mem_device = DEVICE_MEMORY, mem_threadgroup = THREADGROUP_MEMORY };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(unsigned(a) | unsigned(b)); }
inline void threadgroup_barrier(mem_flags flags, LINE) { emulator_threadgroup_barrier(unsigned(flags), line); }
inline void simdgroup_barrier(mem_flags flags, LINE) { emulator_simdgroup_barrier(unsigned(flags), line); }

// ---- Simdgroup functions.
struct Exchanged {
  uint64_t lanes[32][2];
  uint32_t mask;
  template <typename T>
  UNWATCHED T at(int lane) const {
    T value;
    __builtin_memcpy(&value, lanes[lane], sizeof value);
    return value;
  }
  UNWATCHED bool has(int lane) const { return lane >= 0 && lane < 32 && (mask >> lane & 1); }
};
template <typename T>
UNWATCHED inline Exchanged exchange(int operation, T value, int line) {
  static_assert(sizeof(T) <= 16, "a simdgroup function takes at most 16 bytes");
  Exchanged all;
  all.mask = emulator_exchange(operation, &value, sizeof value, all.lanes, line);
  return all;
}
// A tree, as a butterfly of shuffles adds; lanes that do not exist are left out.
template <typename T, typename F>
UNWATCHED inline T reduce(const Exchanged& all, F combine) {
  T value[32];
  bool has[32];
  for (int i = 0; i < 32; i++)
    if ((has[i] = all.has(i))) value[i] = all.at<T>(i);
  for (int step = 16; step; step >>= 1)
    for (int i = 0; i < step; i++)
      if (has[i + step]) {
        value[i] = has[i] ? combine(value[i], value[i + step]) : value[i + step];
        has[i] = true;
      }
  return value[0];
}
#define REDUCTION(NAME, ID, EXPRESSION)                                                    \
  template <typename T>                                                                    \
  UNWATCHED inline T NAME(T value, LINE) {                                                 \
    return reduce<T>(exchange(ID, value, line), [](T a, T b) UNWATCHED { return EXPRESSION; }); \
  }
REDUCTION(simd_sum, 1, a + b)
REDUCTION(simd_max, 2, a > b ? a : b)
REDUCTION(simd_min, 3, a < b ? a : b)
REDUCTION(simd_or, 4, a | b)
#undef REDUCTION
// Reading a lane that takes no part is undefined in Metal; the lane's own value comes back here.
#define SHUFFLE(NAME, ID, SOURCE)                                     \
  template <typename T>                                               \
  UNWATCHED inline T NAME(T value, ushort n, LINE) {                  \
    Exchanged all = exchange(ID, value, line);                        \
    int me = int(emulator_lane()), source = SOURCE;                   \
    (void)me;                                                         \
    return all.has(source) ? all.at<T>(source) : value;               \
  }
SHUFFLE(simd_shuffle, 8, int(n))
SHUFFLE(simd_broadcast, 9, int(n))
SHUFFLE(simd_shuffle_xor, 10, me ^ int(n))
SHUFFLE(simd_shuffle_down, 11, me + int(n))
SHUFFLE(simd_shuffle_up, 12, me - int(n))
#undef SHUFFLE
template <typename T>
UNWATCHED inline T simd_prefix_inclusive_sum(T value, LINE) {
  Exchanged all = exchange(14, value, line);
  T sum = all.at<T>(0);
  for (int i = 1; i <= int(emulator_lane()); i++) sum = sum + all.at<T>(i);
  return sum;
}
template <typename T>
UNWATCHED inline T simd_prefix_exclusive_sum(T value, LINE) {
  Exchanged all = exchange(15, value, line);
  T sum = T(0);
  for (int i = 0; i < int(emulator_lane()); i++) sum = sum + all.at<T>(i);
  return sum;
}
UNWATCHED inline bool simd_any(bool value, LINE) {
  Exchanged all = exchange(16, value, line);
  for (int i = 0; i < 32; i++)
    if (all.has(i) && all.at<bool>(i)) return true;
  return false;
}
#undef LINE

// ---- Atomics: relaxed, 32 bits.
enum memory_order { memory_order_relaxed };
#ifdef EMULATOR_SYNTAX_ONLY
template <typename T>
using atomic = T;
#define UPDATE(NAME, EXPRESSION) \
  template <typename P, typename U> \
  auto NAME(P* cell, U operand, memory_order) -> decltype(+*cell);
template <typename P>
auto atomic_load_explicit(P* cell, memory_order) -> decltype(+*cell);
#else
template <typename T>
struct atomic {
  T value;
};
#define UPDATE(NAME, EXPRESSION)                                           \
  template <typename T, typename U>                                        \
  UNWATCHED inline T NAME(atomic<T>* cell, U operand, memory_order) {      \
    emulator_atomic(cell, sizeof(T), ATOMIC_UPDATE);                       \
    T a = cell->value, b = T(operand);                                     \
    (void)b;                                                               \
    cell->value = EXPRESSION;                                              \
    return a;                                                              \
  }
template <typename T>
UNWATCHED inline T atomic_load_explicit(const atomic<T>* cell, memory_order) {
  emulator_atomic(cell, sizeof(T), ATOMIC_LOAD);
  return cell->value;
}
#endif
UPDATE(atomic_fetch_add_explicit, a + b)
UPDATE(atomic_fetch_max_explicit, a > b ? a : b)
UPDATE(atomic_fetch_min_explicit, a < b ? a : b)
UPDATE(atomic_fetch_or_explicit, a | b)
#undef UPDATE
#ifdef EMULATOR_SYNTAX_ONLY
template <typename P, typename U>
void atomic_store_explicit(P* cell, U operand, memory_order);
#else
template <typename T, typename U>
UNWATCHED inline void atomic_store_explicit(atomic<T>* cell, U operand, memory_order) {
  emulator_atomic(cell, sizeof(T), ATOMIC_STORE);
  cell->value = T(operand);
}
#endif
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;

// ---- Mathematics, on float alone: bodies compute in float32.
inline float exp(float x) { return __builtin_expf(x); }
inline float exp2(float x) { return __builtin_exp2f(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float log2(float x) { return __builtin_log2f(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float floor(float x) { return __builtin_floorf(x); }
inline float ceil(float x) { return __builtin_ceilf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline bool isnan(float x) { return x != x; }
// Of a number and a NaN, Metal's max and min give the number.
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline T select(T no, T yes, bool condition) {
  return condition ? yes : no;
}
inline uint popcount(uint x) { return __builtin_popcount(x); }
}  // namespace metal
using namespace metal;

// Part of the preamble that MLX puts before every Metal kernel.
template <typename I = int64_t>
inline I elem_to_loc(I element, const constant int* shape, const constant int64_t* strides, int dimensions) {
  I location = 0;
  for (int i = dimensions - 1; i >= 0 && element > 0; --i) {
    location += (element % shape[i]) * I(strides[i]);
    element /= shape[i];
  }
  return location;
}
