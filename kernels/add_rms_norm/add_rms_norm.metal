// One threadgroup a row: h = x + r as it is stored, y = h / sqrt(mean(h²) + eps) · w. The row stays in registers.
// x, r [rows, D]  w [D]  →  h, y [rows, D]      template T, D, ITEMS = ceil(D / threads), EPS: the bits of eps
threadgroup float scratch[32];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const size_t start = size_t(row) * D;
float v[ITEMS];
float squares = 0.0f;
for (int k = 0; k < ITEMS; k++) {
  const uint i = thread_index + uint(k) * threads;
  v[k] = 0.0f;
  if (i < uint(D)) {
    const T sum = T(float(x[start + i]) + float(r[start + i]));
    h[start + i] = sum;
    v[k] = float(sum);
  }
  squares += v[k] * v[k];
}
const float total = group_sum(squares, scratch, lane, simdgroup, threads / 32);
const float inverse = metal::rsqrt(total / float(D) + as_type<float>(uint(EPS)));
for (int k = 0; k < ITEMS; k++) {
  const uint i = thread_index + uint(k) * threads;
  if (i < uint(D)) y[start + i] = T(v[k] * inverse * float(w[i]));
}
