// Runs a Metal kernel on the CPU: every thread of a threadgroup is a fiber, scheduled in random order between barriers.
//
// This file is compiled without -fsanitize=thread and *provides* the __tsan_* hooks. The kernel is compiled with it and
// linked without libtsan, so that each of its loads and stores comes here and meets the shadow memory.
#include "abi.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <sys/mman.h>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

// The first and the last byte of this shared object: the linker makes them.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

namespace {
constexpr size_t STACK_BYTES = 128 * 1024, ARENA_BYTES = 1 << 20;
constexpr int SIMD = 32, MAX_THREADS = 1024, MAX_REPORTS = 16;

enum State : uint8_t { READY, AT_BARRIER, AT_SIMD_BARRIER, AT_EXCHANGE, FINISHED, STATES };
const char* const STATE_NAMES[STATES] = {"running", "a threadgroup_barrier", "a simdgroup_barrier", "a simd_* call",
                                         "the end"};

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  char* stack;
  Attributes attributes;
  State state;
  int line;  // of the call that it waits at
  int operation;
  unsigned memory;
  int exchanges;
};

struct Simdgroup {
  int size, exchanging, at_barrier;
  uint64_t values[2][SIMD][2];  // two sets in turn: a quick lane may be one exchange ahead of a slow one
  uint32_t mask[2];
  uint32_t threadgroup_epoch, device_epoch;  // of simdgroup barriers
};

// One access to a cell. What is ordered by barriers has different epochs.
struct Access {
  int32_t thread = -1;
  uint32_t group, epoch, simd_epoch;
  const void* at;
  bool update;
};
struct Cell {
  Access write, read, other_read;
  bool initialised = false;
};
enum RegionKind { INPUT, OUTPUT, THREADGROUP };
struct Region {
  char *begin, *end;
  uint32_t element;
  RegionKind kind;
  std::string name;
  std::vector<Cell> cells;
};
struct Array {  // of threadgroup memory: the site of its declaration and its region
  int id;
  size_t region;
};

struct World {
  Entry entry;
  void** addresses;
  int buffers;
  Options options;
  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  std::vector<int> ready;
  std::vector<Region> regions;
  std::vector<Array> arrays;
  Region* last = nullptr;
  uint32_t group, threadgroup_epoch, device_epoch;
  int live, at_barrier;
  Fiber* current = nullptr;
  bool aborted = false;
  char* arena;
  size_t arena_used = 0;
  uint64_t random;
  std::string log;
  int reports = 0;
  std::vector<std::string> seen;
#ifdef __x86_64__
  void* scheduler;
#else
  ucontext_t scheduler;
#endif
} world;

char* stacks = nullptr;
size_t stacks_held = 0;

uint32_t random_number() {  // xorshift64 (Marsaglia, 2003)
  world.random ^= world.random << 13;
  world.random ^= world.random >> 7;
  world.random ^= world.random << 17;
  return uint32_t(world.random >> 11);
}

// A line of the log: kind, text and the two code addresses, which the caller turns into lines of the body.
void report(const char* kind, const void* first, const void* second, const char* format, ...) {
  char key[128];
  snprintf(key, sizeof key, "%s %p %p", kind, first, second);
  for (const auto& known : world.seen)
    if (known == key) return;
  if (world.reports++ >= MAX_REPORTS) return;
  world.seen.push_back(key);
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char addresses[64];
  snprintf(addresses, sizeof addresses, "\t%p\t%p\n", first, second);
  world.log += std::string(kind) + "\t" + text + addresses;
}

// ---- Fibers.
#ifdef __x86_64__
extern "C" void emulator_switch(void** save, void* to);
asm(".text\n.globl emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
void to_scheduler() { emulator_switch(&world.current->stack_pointer, world.scheduler); }
void to_fiber(Fiber& fiber) { emulator_switch(&world.scheduler, fiber.stack_pointer); }
#else
void to_scheduler() { swapcontext(&world.current->context, &world.scheduler); }
void to_fiber(Fiber& fiber) { swapcontext(&world.scheduler, &fiber.context); }
#endif

void fiber_main() {
  world.entry(world.addresses, &world.current->attributes);
  world.current->state = FINISHED;
  to_scheduler();
  __builtin_trap();
}

void arm(Fiber& fiber) {
#ifdef __x86_64__
  void** top = (void**)(fiber.stack + STACK_BYTES - 64);
  *--top = nullptr;  // fiber_main's return address, so that the stack is aligned as after a call
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the saved registers
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void stop(const char* kind, const void* at, const std::string& text) {
  report(kind, at, nullptr, "%s", text.c_str());
  world.aborted = true;
  to_scheduler();
}

Simdgroup& simdgroup_of(const Fiber& fiber) {
  return world.simdgroups[fiber.attributes.simdgroup_index_in_threadgroup];
}

void wake(State state, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++)
    if (world.fibers[i].state == state) {
      world.fibers[i].state = READY;
      world.ready.push_back(int(i));
    }
}

void wake_simdgroup(State state, const Fiber& fiber) {
  size_t begin = size_t(fiber.attributes.simdgroup_index_in_threadgroup) * SIMD;
  wake(state, begin, begin + simdgroup_of(fiber).size);
}

// ---- Shadow memory.
Region* region_of(const char* address) {
  if (world.last && address >= world.last->begin && address < world.last->end) return world.last;
  for (auto& region : world.regions)
    if (address >= region.begin && address < region.end) return world.last = &region;
  return nullptr;
}

bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0 || (before.thread == now.thread && before.group == now.group)) return true;
  if (before.update && now.update) return true;    // atomic updates commute; a plain access next to one is reported
  if (before.group != now.group) return false;     // nothing orders two threadgroups of a dispatch
  if (before.epoch < now.epoch) return true;
  return before.thread / SIMD == now.thread / SIMD && before.simd_epoch < now.simd_epoch;
}

void out_of_bounds(const char* address, size_t bytes, bool write, const void* at) {
  const char* nearest = "nothing";
  ptrdiff_t best = 1 << 20, index = 0;
  for (const auto& region : world.regions)
    for (const char* edge : {region.begin, region.end}) {
      ptrdiff_t distance = address > edge ? address - edge : edge - address;
      if (distance < best) {
        best = distance;
        nearest = region.name.c_str();
        index = (address - region.begin) / ptrdiff_t(region.element);
      }
    }
  char text[200];
  snprintf(text, sizeof text, "%s of %zu bytes at %s[%td], by thread %u of threadgroup %u", write ? "write" : "read",
           bytes, nearest, index, world.current->attributes.thread_index_in_threadgroup, world.group);
  stop("OUT_OF_BOUNDS", at, text);
}

bool private_memory(const char* address) {  // the fiber's locals and attributes, the wrapper's tables
  const Fiber* fiber = world.current;
  auto within = [&](const void* begin, size_t bytes) {
    return address >= (const char*)begin && address < (const char*)begin + bytes;
  };
  return within(fiber->stack, STACK_BYTES) || within(fiber, sizeof *fiber) ||
         within(world.addresses, world.buffers * sizeof(void*));
}

bool constant_data(const char* address) { return address >= __ehdr_start && address < _end; }

void race(const Access& before, const Access& now, const char* what, const Region& region, size_t index) {
  report("RACE", before.at, now.at, "%s on %s[%zu]: thread %d and thread %d%s with no barrier between", what,
         region.name.c_str(), index, before.thread, now.thread, before.group != now.group ? " of another threadgroup" : "");
}

void touch(Region& region, size_t index, const Access& now, bool write) {
  Cell& cell = region.cells[index];
  if ((!write || now.update) && !cell.initialised)
    report("UNINITIALISED", now.at, nullptr, "read of %s[%zu] before any write, by thread %d", region.name.c_str(), index,
           now.thread);
  if (write) {
    if (!ordered(cell.write, now)) race(cell.write, now, "write and write", region, index);
    if (!ordered(cell.read, now)) race(cell.read, now, "read and write", region, index);
    else if (!ordered(cell.other_read, now)) race(cell.other_read, now, "read and write", region, index);
    cell.write = now;
    cell.initialised = true;
    return;
  }
  if (!ordered(cell.write, now)) race(cell.write, now, "write and read", region, index);
  // Two readers are kept, of two simdgroups where there are: one of them is not ordered with a later bad write.
  auto replaces = [&](const Access& old) {
    return old.thread < 0 || old.thread == now.thread || old.group != now.group || old.epoch < now.epoch;
  };
  if (replaces(cell.read)) cell.read = now;
  else if (replaces(cell.other_read) || cell.other_read.thread / SIMD == cell.read.thread / SIMD) cell.other_read = now;
}

void access(const char* address, size_t bytes, bool write, bool update, const void* at) {
  Fiber* fiber = world.current;
  if (!fiber || world.aborted || private_memory(address)) return;
  Region* region = region_of(address);
  if (!region && constant_data(address)) return;
  if (!region || address + bytes > region->end) return out_of_bounds(address, bytes, write, at);
  if (bytes <= 16 && (uintptr_t)address % bytes) {
    report("MISALIGNED", at, nullptr, "access of %zu bytes at %s + %td bytes, which is no multiple of them", bytes,
           region->name.c_str(), address - region->begin);
  }
  if (region->kind == INPUT) {
    if (write) stop("WRITE_TO_INPUT", at, region->name);
    return;
  }
  bool local = region->kind == THREADGROUP;
  const Simdgroup& simdgroup = simdgroup_of(*fiber);
  Access now;
  now.thread = int(fiber->attributes.thread_index_in_threadgroup);
  now.group = world.group;
  now.epoch = local ? world.threadgroup_epoch : world.device_epoch;
  now.simd_epoch = local ? simdgroup.threadgroup_epoch : simdgroup.device_epoch;
  now.at = at;
  now.update = update;
  size_t first = (address - region->begin) / region->element, last = (address + bytes - 1 - region->begin) / region->element;
  for (size_t i = first; i <= last; i++) touch(*region, i, now, write);
}
}  // namespace

extern "C" {
#define CALLER __builtin_return_address(0)
#define HOOKS(N)                                                                                       \
  void __tsan_read##N(void* p) { access((char*)p, N, false, false, CALLER); }                          \
  void __tsan_write##N(void* p) { access((char*)p, N, true, false, CALLER); }                          \
  void __tsan_unaligned_read##N(void* p) { access((char*)p, N, false, false, CALLER); }                \
  void __tsan_unaligned_write##N(void* p) { access((char*)p, N, true, false, CALLER); }                \
  void __tsan_volatile_read##N(void* p) { access((char*)p, N, false, false, CALLER); }                 \
  void __tsan_volatile_write##N(void* p) { access((char*)p, N, true, false, CALLER); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) {
  if (n) access((char*)p, n, false, false, CALLER);
}
void __tsan_write_range(void* p, size_t n) {
  if (n) access((char*)p, n, true, false, CALLER);
}

uint32_t emulator_lane() { return world.current->attributes.thread_index_in_simdgroup; }

void emulator_threadgroup_barrier(unsigned memory, int line) {
  Fiber* fiber = world.current;
  fiber->state = AT_BARRIER;
  fiber->line = line;
  fiber->memory = memory;
  world.at_barrier++;
  to_scheduler();
}

void emulator_simdgroup_barrier(unsigned memory, int line) {
  Fiber* fiber = world.current;
  Simdgroup& group = simdgroup_of(*fiber);
  fiber->line = line;
  if (++group.at_barrier < group.size) {
    fiber->state = AT_SIMD_BARRIER;
    to_scheduler();
    return;
  }
  group.at_barrier = 0;
  if (memory & THREADGROUP_MEMORY) group.threadgroup_epoch++;
  if (memory & DEVICE_MEMORY) group.device_epoch++;
  wake_simdgroup(AT_SIMD_BARRIER, *fiber);
}

uint32_t emulator_exchange(int operation, const void* value, size_t bytes, uint64_t (*lanes)[2], int line) {
  Fiber* fiber = world.current;
  Simdgroup& group = simdgroup_of(*fiber);
  int set = fiber->exchanges++ & 1;
  uint32_t lane = fiber->attributes.thread_index_in_simdgroup;
  size_t first = size_t(fiber->attributes.simdgroup_index_in_threadgroup) * SIMD;
  if (group.exchanging == 0) group.mask[set] = 0;
  for (int i = 0; group.exchanging && i < group.size; i++) {
    const Fiber& other = world.fibers[first + i];
    if (other.state != AT_EXCHANGE || (other.operation == operation && other.line == line)) continue;
    stop("SIMD_DIVERGENCE", CALLER, "lanes of a simdgroup meet at different simd_* calls (lines " +
                                        std::to_string(other.line) + " and " + std::to_string(line) + ")");
  }
  memcpy(group.values[set][lane], value, bytes);
  group.mask[set] |= 1u << lane;
  fiber->line = line;
  fiber->operation = operation;
  if (++group.exchanging == group.size) {
    group.exchanging = 0;
    wake_simdgroup(AT_EXCHANGE, *fiber);
  } else {
    fiber->state = AT_EXCHANGE;
    to_scheduler();
  }
  memcpy(lanes, group.values[set], sizeof group.values[set]);
  return group.mask[set];
}

void* emulator_threadgroup_array(int id, size_t bytes, size_t element, const char* name) {
  for (const auto& array : world.arrays)
    if (array.id == id) return world.regions[array.region].begin;
  size_t at = (world.arena_used + 127) & ~size_t(127), total = bytes;
  world.arena_used = at + bytes + 128;  // a gap, so that an index error lands in no other array
  if (world.arena_used > ARENA_BYTES) stop("THREADGROUP_MEMORY", CALLER, "more than the emulator holds");
  for (const auto& array : world.arrays) total += world.regions[array.region].end - world.regions[array.region].begin;
  if (total > world.options.threadgroup_limit)
    report("THREADGROUP_MEMORY", CALLER, nullptr, "%zu bytes of threadgroup memory, the limit is %u", total,
           world.options.threadgroup_limit);
  Region region{world.arena + at, world.arena + at + bytes, uint32_t(element), THREADGROUP, name, {}};
  region.cells.resize(world.options.checked ? bytes / element : 0);
  memset(region.begin, 0xff, bytes);
  world.regions.push_back(std::move(region));
  world.last = nullptr;
  world.arrays.push_back({id, world.regions.size() - 1});
  return world.arena + at;
}

void emulator_atomic(const void* address, size_t bytes, int kind) {
  if (world.options.checked) access((const char*)address, bytes, kind != ATOMIC_LOAD, kind == ATOMIC_UPDATE, CALLER);
  if (world.options.seed && (random_number() & 7) == 0) {  // another thread may come between two atomics
    world.ready.push_back(int(world.current - world.fibers.data()));
    to_scheduler();
  }
}
}  // extern "C"

namespace {
void place(Fiber& fiber, int index, const int* group, const int* threads, const int* size, const int* grid, const int* groups) {
  auto triple = [](const int* v) { return uint3{uint32_t(v[0]), uint32_t(v[1]), uint32_t(v[2])}; };
  Attributes& a = fiber.attributes;
  memset(&a, 0, sizeof a);
  uint32_t x = index % size[0], y = index / size[0] % size[1], z = index / size[0] / size[1];
  a.thread_position_in_threadgroup = {x, y, z};
  a.thread_position_in_grid = {group[0] * threads[0] + x, group[1] * threads[1] + y, group[2] * threads[2] + z};
  a.threadgroup_position_in_grid = triple(group);
  a.threads_per_threadgroup = triple(size);
  a.dispatch_threads_per_threadgroup = triple(threads);
  a.threads_per_grid = a.grid_size = triple(grid);
  a.threadgroups_per_grid = triple(groups);
  uint32_t here = size[0] * size[1] * size[2], dispatched = threads[0] * threads[1] * threads[2];
  a.thread_index_in_threadgroup = index;
  a.thread_index_in_simdgroup = index % SIMD;
  a.simdgroup_index_in_threadgroup = index / SIMD;
  a.simdgroups_per_threadgroup = (here + SIMD - 1) / SIMD;
  a.dispatch_simdgroups_per_threadgroup = (dispatched + SIMD - 1) / SIMD;
  a.threads_per_simdgroup = a.thread_execution_width = SIMD;
  a.thread_index_in_quadgroup = index % 4;
  a.quadgroup_index_in_threadgroup = index / 4;
  a.quadgroups_per_threadgroup = (here + 3) / 4;
  a.dispatch_quadgroups_per_threadgroup = (dispatched + 3) / 4;
}

void release_barrier() {
  const Fiber& first = world.fibers[0];
  for (const auto& fiber : world.fibers)
    if (fiber.line != first.line || fiber.memory != first.memory) {
      report("BARRIER_DIVERGENCE", nullptr, nullptr, "threads wait at different barriers (lines %d and %d)", first.line,
             fiber.line);
      break;
    }
  if (first.memory & THREADGROUP_MEMORY) world.threadgroup_epoch++;
  if (first.memory & DEVICE_MEMORY) world.device_epoch++;
  world.at_barrier = 0;
  wake(AT_BARRIER, 0, world.fibers.size());
}

void report_stuck() {
  int count[STATES] = {}, line[STATES] = {}, example[STATES] = {};
  for (const auto& fiber : world.fibers) {
    count[fiber.state]++;
    line[fiber.state] = fiber.line;
    example[fiber.state] = int(fiber.attributes.thread_index_in_threadgroup);
  }
  std::string text = "nobody can go on:";
  for (int s = AT_BARRIER; s < STATES; s++)
    if (count[s])
      text += " " + std::to_string(count[s]) + " threads at " + STATE_NAMES[s] +
              (s == FINISHED ? "" : " in line " + std::to_string(line[s])) + " (thread " + std::to_string(example[s]) + ");";
  bool simd = count[AT_EXCHANGE] || count[AT_SIMD_BARRIER];
  report(simd ? "SIMD_DIVERGENCE" : "BARRIER_DIVERGENCE", nullptr, nullptr, "%s", text.c_str());
  world.aborted = true;
}

void schedule() {
  while (world.live > 0 && !world.aborted) {
    if (world.ready.empty()) {
      if (world.at_barrier == int(world.fibers.size())) release_barrier();
      else report_stuck();
      continue;
    }
    size_t pick = world.options.seed ? random_number() % world.ready.size() : world.ready.size() - 1;
    int index = world.ready[pick];
    world.ready[pick] = world.ready.back();
    world.ready.pop_back();
    world.current = &world.fibers[index];
    to_fiber(*world.current);
    world.current = nullptr;
    if (world.fibers[index].state == FINISHED) world.live--;
  }
}

void run_group(uint32_t linear, const int* grid, const int* threads, const int* groups) {
  int group[3] = {int(linear % groups[0]), int(linear / groups[0] % groups[1]), int(linear / groups[0] / groups[1])}, size[3];
  for (int d = 0; d < 3; d++) size[d] = std::min(threads[d], grid[d] - group[d] * threads[d]);  // Metal cuts the edge short
  int count = size[0] * size[1] * size[2];
  world.group = linear;
  world.threadgroup_epoch = world.device_epoch = 1;
  world.at_barrier = 0;
  world.live = count;
  world.last = nullptr;
  for (const auto& array : world.arrays) {  // threadgroup memory holds nothing of the group before
    Region& region = world.regions[array.region];
    memset(region.begin, 0xff, region.end - region.begin);
    std::fill(region.cells.begin(), region.cells.end(), Cell());
  }
  world.simdgroups.assign((count + SIMD - 1) / SIMD, Simdgroup());
  for (size_t i = 0; i < world.simdgroups.size(); i++) world.simdgroups[i].size = std::min(SIMD, count - int(i) * SIMD);
  world.fibers.resize(count);
  world.ready.clear();
  for (int i = 0; i < count; i++) {
    Fiber& fiber = world.fibers[i];
    place(fiber, i, group, threads, size, grid, groups);
    fiber.stack = stacks + size_t(i) * STACK_BYTES;
    fiber.state = READY;
    fiber.exchanges = fiber.line = 0;
    fiber.memory = 0;
    arm(fiber);
    world.ready.push_back(i);
  }
  schedule();
}

void map_buffers(const Buffer* buffers, int count) {
  for (int i = 0; i < count; i++) {
    const Buffer& buffer = buffers[i];
    Region region{(char*)buffer.data, (char*)buffer.data + buffer.bytes, buffer.element, buffer.output ? OUTPUT : INPUT,
                  buffer.name, {}};
    if (buffer.output && world.options.checked) region.cells.resize(buffer.bytes / buffer.element);
    if (buffer.initialised)
      for (auto& cell : region.cells) cell.initialised = true;
    world.regions.push_back(std::move(region));
  }
}

void report_unwritten() {
  for (const auto& region : world.regions) {
    if (region.kind != OUTPUT) continue;
    size_t missing = 0, first = 0;
    for (size_t i = 0; i < region.cells.size(); i++)
      if (!region.cells[i].initialised && !missing++) first = i;
    if (missing)
      report("UNWRITTEN_OUTPUT", nullptr, region.begin, "%zu of %zu elements of %s were never written, the first is [%zu]",
             missing, region.cells.size(), region.name.c_str(), first);
  }
}

void* fresh_memory(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
}  // namespace

// Runs `entry` over the grid; returns the number of reports and writes them, a line each, to `log`.
extern "C" int emulator_run(Entry entry, void** addresses, const Buffer* buffers, int count, const int* grid,
                            const int* threadgroup, const Options* options, char* log, size_t log_bytes) {
  world.~World();
  new (&world) World();
  world.entry = entry;
  world.addresses = addresses;
  world.buffers = count;
  world.options = *options;
  world.random = 0x9E3779B97F4A7C15ull ^ (options->seed * 0xD1342543DE82EF95ull + 1);
  map_buffers(buffers, count);
  int threads[3], groups[3];
  for (int d = 0; d < 3; d++) {
    threads[d] = std::min(threadgroup[d], grid[d]);
    groups[d] = (grid[d] + threads[d] - 1) / threads[d];
  }
  size_t most = size_t(threads[0]) * threads[1] * threads[2];
  if (most > MAX_THREADS) report("LAUNCH", nullptr, nullptr, "a threadgroup of %zu threads, the limit is 1024", most);
  world.arena = (char*)fresh_memory(ARENA_BYTES);
  if (stacks_held < most) {
    if (stacks) munmap(stacks, stacks_held * STACK_BYTES);
    stacks = (char*)fresh_memory(most * STACK_BYTES);
    stacks_held = most;
  }
  std::vector<uint32_t> order(size_t(groups[0]) * groups[1] * groups[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = uint32_t(i);
  if (options->seed)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  for (uint32_t linear : order) {
    if (world.aborted) break;
    run_group(linear, grid, threads, groups);
  }
  if (options->checked && !world.aborted) report_unwritten();
  munmap(world.arena, ARENA_BYTES);
  snprintf(log, log_bytes, "%s", world.log.c_str());
  return world.reports;
}
