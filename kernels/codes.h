// Keys and values in BITS, 8 or 4, as `kernels/packed_kv.py` makes them: of a head [WIDTH] words of codes, the first number in the
// lowest bits, then a word for every GROUPED numbers, whose halves are their step and the least of them (float16).
#ifndef inline_function
#define inline_function inline
#endif

template <typename T, int BITS, int DIM, int PACK, int GROUPED>
struct Kept {
  struct Loaded {
    uint codes[PACK * BITS / 32];
    uint form;
  };
  template <typename P>
  static inline_function Loaded load(P head, uint piece) {
    Loaded loaded;
    for (int w = 0; w < PACK * BITS / 32; w++) loaded.codes[w] = head[piece * uint(PACK * BITS / 32) + uint(w)];
    loaded.form = head[uint(DIM * BITS / 32) + piece / uint(GROUPED / PACK)];
    return loaded;
  }
  static inline_function float at(Loaded loaded, int d) {
    const uint code = loaded.codes[d * BITS / 32] >> uint(d * BITS % 32) & ((1u << BITS) - 1u);
    const float step = float(as_type<half>(ushort(loaded.form & 0xffffu)));
    return float(code) * step + float(as_type<half>(ushort(loaded.form >> 16)));
  }
  // The lane's numbers x [PACK] become those of their codes, bit for bit as the plain form rounds them. By the whole simdgroup.
  template <typename X, typename P>
  static inline_function void keep(X x, P head, uint piece, bool writes) {
    float low = x[0];
    float high = x[0];
    float none = 0.0f;  // NaN where a number is not finite: so is the step then, and the whole group
    for (int d = 0; d < PACK; d++) {
      low = metal::min(low, x[d]);
      high = metal::max(high, x[d]);
      none += x[d] - x[d];
    }
    for (uint other = GROUPED / PACK / 2; other > 0; other >>= 1) {
      low = metal::min(low, metal::simd_shuffle_xor(low, ushort(other)));
      high = metal::max(high, metal::simd_shuffle_xor(high, ushort(other)));
      none += metal::simd_shuffle_xor(none, ushort(other));
    }
    const float last = float((1u << BITS) - 1u);
    const half least = half(low);
    const half step = half((high - float(least)) / last + none);
    const float inverse = float(step) > 0.0f ? 1.0f / float(step) : 0.0f;
    Loaded kept;
    for (int w = 0; w < PACK * BITS / 32; w++) kept.codes[w] = 0u;
    kept.form = uint(as_type<ushort>(step)) | uint(as_type<ushort>(least)) << 16;
    for (int d = 0; d < PACK; d++) {
      const float code = metal::rint((x[d] - float(least)) * inverse);
      kept.codes[d * BITS / 32] |= uint(code > 0.0f ? metal::min(code, last) : 0.0f) << uint(d * BITS % 32);
    }
    for (int d = 0; d < PACK; d++) x[d] = at(kept, d);
    if (!writes) return;
    for (int w = 0; w < PACK * BITS / 32; w++) head[piece * uint(PACK * BITS / 32) + uint(w)] = kept.codes[w];
    if (piece % uint(GROUPED / PACK) == 0) head[uint(DIM * BITS / 32) + piece / uint(GROUPED / PACK)] = kept.form;
  }
};
