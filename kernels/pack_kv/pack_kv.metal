// Keys and values of new tokens as words (`codes.h`). A lane has PACK numbers of a head; as many lanes as have a group are a
// power of two, so that no group is parted between simdgroups.
// keys, values [rows, heads, tokens, DIM]: y of the grid says which of both a threadgroup has
//   →  kept_keys, kept_values [rows, heads, tokens, WIDTH]
// template T, DIM, BITS, WIDTH, GROUPED: numbers of a group, PACK
typedef Kept<T, BITS, DIM, PACK, GROUPED> Form;
constexpr int LANES = DIM / PACK;
const uint lanes = uint(keys_shape[0]) * uint(keys_shape[1]) * uint(keys_shape[2]) * uint(LANES);
const uint lane = threadgroup_position_in_grid.x * threads_per_threadgroup.x + thread_position_in_threadgroup.x;
// Lanes beyond the last take what it has, and write nothing: a whole simdgroup looks for the bounds of groups.
const uint held = metal::min(lane, lanes - 1);
auto from = threadgroup_position_in_grid.y == 0 ? keys : values;
auto to = threadgroup_position_in_grid.y == 0 ? kept_keys : kept_values;
float x[PACK];
for (int d = 0; d < PACK; d++) x[d] = float(from[size_t(held) * PACK + d]);
Form::keep(x, to + size_t(held / uint(LANES)) * WIDTH, held % uint(LANES), lane < lanes);
