#ifndef inline_function
#define inline_function inline
#endif
// Scores and their order, for both launches of `sample`: a bin is 1/8 wide, and within it a score has 24 bits.
#define SCORE_LIMIT 1.3e8f
// max takes the number and not the NaN, so a NaN sorts last.
inline_function float scaled_score(float value, float temperature) {
  return metal::min(metal::max(value / temperature, -SCORE_LIMIT), SCORE_LIMIT);
}
// Times eight is exact, and so are floor and the difference: both launches find the same.
inline_function int score_bin(float score) { return int(metal::floor(score * 8.0f)); }
inline_function float bin_fraction(float score) { return score * 8.0f - metal::floor(score * 8.0f); }
// The place within a bin, from the largest score on.
inline_function uint bin_place(float score) { return 0xffffffu - metal::min(uint(bin_fraction(score) * 16777216.0f), 0xffffffu); }
