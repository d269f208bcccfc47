#ifndef inline_function
#define inline_function inline
#endif
// Scores, their order and their masses, for both launches of `sample`. A bin is 1/8 wide.
// A score at or below minus this is none. Eight times it is still a float.
#define SCORE_LIMIT 4e37f
// What the smallest normal float is: a GPU may take what is smaller for 0.
#define SMALLEST 1.17549435e-38f
inline_function bool is_temperature(float t) { return t >= SMALLEST; }  // no NaN is
// The row's temperature where it is one; such a row is greedy otherwise.
inline_function float usable(float t) { return is_temperature(t) ? metal::min(t, 3e38f) : 1.0f; }
// Within the limits, a NaN at the lower one; there is one zero.
inline_function float scaled_score(float value, float temperature) {
  const float score = value / temperature;
  if (metal::abs(score) < SMALLEST) return 0.0f;
  return score > -SCORE_LIMIT ? (score < SCORE_LIMIT ? score : SCORE_LIMIT) : -SCORE_LIMIT;
}
// A logit as the raw model's log-probabilities take it: a NaN and what is infinite at the ends of what is finite.
inline_function float finite_logit(float value) { return value > -3e38f ? (value < 3e38f ? value : 3e38f) : -3e38f; }
// Times eight is exact, and so are floor and the differences: both launches find the same.
inline_function float bin_fraction(float score) { return score * 8.0f - metal::floor(score * 8.0f); }
// How many bins the score lies below that of `best`, which is no smaller; at most 256.
inline_function uint bins_below(float best, float score) {
  return uint(metal::min(metal::floor(best * 8.0f) - metal::floor(score * 8.0f), 256.0f));
}
// What e^(score − the bin's upper edge) lacks of 1, in units that let the sum over the vocabulary fit 32 bits: a deficit
// is at most 1 − e^(−1/8) < 0.1176. Both launches add the same integers, so that what one finds the other finds.
#define DEFICIT_UNITS (V <= 270000 ? 131072.0f : 32768.0f)
inline_function uint deficit(float score, float units) {
  return uint(metal::rint((1.0f - metal::exp((bin_fraction(score) - 1.0f) * 0.125f)) * units));
}
