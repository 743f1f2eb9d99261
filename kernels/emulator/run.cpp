// Reads one launch from standard input, runs it in the emulator, writes the buffers back: the other half is
// tests/kernels/emulator.rs. Compile with -DSOURCE='"file.cu"'.
//
// All numbers are little-endian. In: u32 name length, name, u32 grid[3], block[3], shared bytes, place of a barrier to leave
// out, blocks per cluster (0: not cooperative), u64 seed (0: threads in order), u32 bytes of arguments, arguments, u32 pointers
// among them, u32 buffers, then of each u64 bytes and contents. The pointers stand first in the arguments, as u64: 0 for null,
// else 1 + number of a buffer.
// Out: the buffers' contents.
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"
#include SOURCE

static void read_exactly(void* to, size_t n) {
  if (fread(to, 1, n, stdin) != n) {
    fprintf(stderr, "the launch ends too early\n");
    exit(2);
  }
}

template <class T>
static T read_one() {
  T x;
  read_exactly(&x, sizeof(T));
  return x;
}

/// Memory between two pages that nobody may touch; its end lies at the later one, so reading beyond it ends the program.
struct Buffer {
  uint8_t* data;
  size_t size;
};

static Buffer guarded(size_t size) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (size + 15) / 16 * 16;
  const size_t inside = (rounded + page - 1) / page * page;
  auto* all = static_cast<uint8_t*>(
      mmap(nullptr, inside + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (all == MAP_FAILED || mprotect(all, page, PROT_NONE) || mprotect(all + page + inside, page, PROT_NONE)) {
    perror("mmap");
    exit(2);
  }
  memset(all + page, emulator::CANARY_BYTE, inside);
  return {all + page + inside - rounded, size};
}

int main() {
  using namespace emulator;
  std::string name(read_one<uint32_t>(), ' ');
  read_exactly(name.data(), name.size());
  gridDim = read_one<Dim3>();
  blockDim = read_one<Dim3>();
  shared_bytes = read_one<uint32_t>();
  launch.left_out = read_one<uint32_t>();
  launch.cluster = read_one<uint32_t>();
  random_state = read_one<uint64_t>();
  // As the driver does, arguments lie aligned.
  std::vector<uint64_t> args((read_one<uint32_t>() + 7) / 8);
  const size_t args_size = args.size() * 8;
  read_exactly(args.data(), args_size);
  const size_t n_pointers = read_one<uint32_t>();
  std::vector<Buffer> buffers(read_one<uint32_t>());
  for (Buffer& buffer : buffers) {
    buffer = guarded(read_one<uint64_t>());
    read_exactly(buffer.data, buffer.size);
  }
  for (size_t i = 0; i < n_pointers; ++i)
    if (args[i] != 0) args[i] = reinterpret_cast<uint64_t>(buffers.at(args[i] - 1).data);

  const size_t n_threads = block_threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  for (const Kernel& kernel : kernels()) {
    if (name != kernel.name) continue;
    if (args_size != kernel.args_size || n_threads > kernel.max_threads || n_threads % LANES != 0) {
      fprintf(stderr, "%s: %zu bytes of arguments and %zu threads, takes %zu and at most %u\n", name.c_str(), args_size,
              n_threads, kernel.args_size, kernel.max_threads);
      return 2;
    }
    launch.body = kernel.body;
    launch.args = args.data();
    std::vector<Dim3> grid;
    for (unsigned z = 0; z < gridDim.z; ++z)
      for (unsigned y = 0; y < gridDim.y; ++y)
        for (unsigned x = 0; x < gridDim.x; ++x) grid.push_back({x, y, z});
    if (launch.cluster > 0) {
      if (grid.size() % launch.cluster != 0) fail("the grid is no whole number of clusters");
      run(grid);
    } else {
      for (const Dim3& block : grid) run({block});
    }
    for (const Buffer& buffer : buffers) {
      for (size_t i = buffer.size; i % 16 != 0; ++i)
        if (buffer.data[i] != CANARY_BYTE) fail("wrote beyond a buffer");
      fwrite(buffer.data, 1, buffer.size, stdout);
    }
    return 0;
  }
  fprintf(stderr, "no kernel is called %s\n", name.c_str());
  return 2;
}
