// Loads of 16 bytes: eight numbers of 16 bits or four of 32.
#ifndef inline_function
#define inline_function inline
#endif
#ifndef DEVICE_POINTER  // a cast has to name the address space on Metal
#define DEVICE_POINTER(T, POINTER) ((const device T*)(POINTER))
#endif
inline_function uint word_of(uint4 words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
template <typename T>
struct Packed {
  static inline_function float at(uint4 words, int i) {
    const uint word = word_of(words, i / 2);
    return float(as_type<T>(ushort(i % 2 ? word >> 16 : word & 0xffffu)));
  }
};
template <>
struct Packed<float> {
  static inline_function float at(uint4 words, int i) { return as_type<float>(word_of(words, i)); }
};
