// Generation: one cooperative launch plays whole plan frames of one or many streams, thousands of samples, without the host.
//
// A group of blocks (a cluster) plays a set of up to ROWS streams sample by sample, and set after set if it has several. Plan
// and forecast from the past do not depend on the sample that is being made: with `overlapped` they have blocks of their own in the
// same launch, which run ahead and hand over through device memory and flags (release, acquire); else the group's one block
// does everything in turn, with the same results. Weights of the fine tiers lie in shared memory as far as they fit.
//
// Geometry: clusters of `group_size` blocks; cluster c serves group c / roles in role c % roles (play, renew, plan), where roles
// is 3 if overlapped, else 1 (and group_size 1). The helpers' clusters use their first block. Threads: a multiple of 32, at
// most 256. Layouts in args.cuh, shared memory in src/cuda/launch/decode.rs.
// Oracle: the CPU engine in f32 (src/engine/cpu), in tests/decode.rs.
#include "decode_plan.cuh"
#include "decode_wave.cuh"

namespace decode {

constexpr int MAX_THREADS = 256;
/// Frames that the plan is ahead.
constexpr int SLOTS = 2;
enum Role { PLAY, RENEW, PLAN };
enum Flag { PLAYED, RENEWED, PLANNED, N_FLAGS = 4 };

// ---- helpers -------------------------------------------------------------------------------------------------------

/// Rows become the streams of a set.
template <class W, int ROWS>
__device__ void take(const Room<W, ROWS>& room, int set) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int n_rows = min(ROWS, a.streams - set * ROWS);
  // Those of the set before were read (no emulated schedule shows it: what is read after the last barrier is little).
  __syncthreads();  // unseen
  if (threadIdx.x == 0) {
    room.block().n_rows = n_rows;
    room.block().fresh = true;
  }
  for (int r = threadIdx.x; r < n_rows; r += blockDim.x) {
    Row& row = room.rows()[r];
    row.turn = set * ROWS + r;
    row.stream = a.who[row.turn];
    const int64_t* const counters = a.counters + 4 * int64_t(row.stream);
    row.n = counters[0];
    row.plan_pos = counters[1];
    row.residual_code = int(counters[2]);
    row.mean_square = a.memory[int64_t(row.stream) * m.memory_stride + m.drive];
    for (int i = 0; i < m.n_tiers; ++i) row.at[i].begin(row.n / m.tiers[i].hop, m.tiers[i].stack.window);
    row.at[m.n_tiers].begin(row.plan_pos, m.plan.window);
  }
  __syncthreads();  // publishes the rows
}

/// What the last samples were, for the block that plays.
template <class W, int ROWS>
__device__ void recall(const Room<W, ROWS>& room) {
  const DecodeModel& m = room.m();
  for (int r = 0; r < room.n_rows(); ++r) {
    const float* const memory = room.memory(r);
    const int64_t n = room.rows()[r].n, first = n - m.n_recent;
    for (int i = threadIdx.x; i < m.n_recent; i += blockDim.x)
      room.samples()[r * m.n_recent + int((first + i) & (m.n_recent - 1))] =
          memory[m.samples + int((first + i) & (m.n_samples - 1))];
    for (int i = threadIdx.x; i < m.n_left; i += blockDim.x) room.left()[r * m.n_left + i] = memory[m.left + i];
    for (int i = threadIdx.x; i < m.n_tokens; i += blockDim.x)
      room.tokens()[r * m.n_tokens + i] = room.a().ring_tokens[int64_t(room.rows()[r].stream) * m.n_tokens + i];
  }
}

/// Coefficients of the forecast from the past and tones from sample in_frame of the frame in `slot` on, and where that begins what it
/// says of every sample, its forecast damped if what was played is too loud.
template <class W, int ROWS>
__device__ void fetch(const Room<W, ROWS>& room, int in_frame, int slot) {
  const DecodeModel& m = room.m();
  for (int i = threadIdx.x; i < room.n_rows() * m.past_hop && m.n_heard > 0; i += blockDim.x)
    room.tones()[i] = room.memory(i / m.past_hop)[m.tones + in_frame + i % m.past_hop];
  for (int i = threadIdx.x; i < room.n_rows() * m.order; i += blockDim.x)
    room.past()[i] = room.a().past[int64_t(room.rows()[i / m.order].stream) * m.order + i % m.order];
  if (in_frame == 0) {
    const int n_scales = m.slices * m.n_components;
    for (int i = threadIdx.x; i < room.n_rows() * n_scales; i += blockDim.x)
      room.scales()[i] = room.frame(i / n_scales, slot)[m.frame_scales + i % n_scales];
    const int order = m.planned_order, mask = m.n_left - 1;
    for (int r = warp(); r < room.n_rows(); r += n_warps()) {
      const float* const frame = room.frame(r, slot);
      double damping = 0.0;
      if (m.deconvolution > 0) {
        const float* const ring = room.left() + r * m.n_left;
        const int latest = int((room.rows()[r].n - 1) & mask);
        double heard = 0.0;
        for (int i = lane(); i < order; i += WARP) {
          const double x = ring[(latest - i) & mask];
          heard += x * x;
        }
        damping = prediction::damping(lanes_sum<WARP>(heard) / order, frame[2]);
      }
      for (int i = lane(); i < order; i += WARP)
        room.planned()[r * order + i] = prediction::damped(frame[m.frame_coefficients + i], i, damping);
      if (lane() == 0) {
        room.rows()[r].log_scale = frame[0];
        room.rows()[r].rms = frame[1];
      }
    }
  }
  if (threadIdx.x == 0) look_up(room, in_frame);
  __syncthreads();  // publishes coefficients and scales
  for (int r = warp(); r < room.n_rows(); r += n_warps()) sum_ahead(room, r, room.rows()[r].n - 1);
  __syncthreads();  // publishes the sums
}

// ---- roles ---------------------------------------------------------------------------------------------------------
// Inlined by force: functions of their own get half the registers.

/// Plays a set of streams; with `alone`, makes plan and coefficients as well.
template <class W, int ROWS>
__device__ __forceinline__ void play(const Room<W, ROWS>& room, uint32_t* flags, bool alone) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  if (a.make_wave) recall(room);
  for (int k = 0; k < a.n_frames; ++k) {
    if (alone && a.make_plan) plan_frame(room, k);
    if (!a.make_wave) {
      if (threadIdx.x == 0) room.block().fresh = false;
      continue;
    }
    if (alone) prepare_frame(room, k, k % SLOTS);
    for (int begin = 0; begin < m.plan_hop; begin += m.past_hop) {
      const int first = k * m.plan_hop + begin;
      if (alone) {
        double* const lags = past_lags(room, 0);
        renew_past(room, lags, 0);
        if (begin == 0 && m.n_heard > 0) begin_tones(room, k % SLOTS, 0);
      } else {
        // All blocks of the group have started, and played what came before (no emulated schedule shows it: the helpers
        // would have to overtake a block within a barrier's time).
        GROUP_BARRIER(room.size());  // unseen
        if (threadIdx.x == 0) {
          if (room.rank() == 0) store_release(&flags[PLAYED], uint32_t(first));
          WAIT_FOR(&flags[RENEWED], uint32_t(first / m.past_hop + 1));
        }
        __syncthreads();  // coefficients and frame are there
      }
      fetch(room, begin, k % SLOTS);
      // Nothing in here is a function that is called: what its caller keeps would be kept in memory.
      for (int since = 0; since < m.past_hop; ++since) step<W, ROWS>(first + since, begin + since, since, k % SLOTS);
    }
  }
  for (int r = threadIdx.x; r < room.n_rows() && room.rank() == 0; r += blockDim.x) {
    const Row& row = room.rows()[r];
    int64_t* const counters = a.counters + 4 * int64_t(row.stream);
    counters[0] = row.n;
    if (alone) counters[1] = row.plan_pos;
    counters[2] = row.residual_code;
    room.memory(r)[m.drive] = row.mean_square;
  }
}

/// Renews what follows from the past: the coefficients of the forecast from it (what is known of the next window is summed while it
/// is played), and the tones of a frame that begins.
template <class W, int ROWS>
__device__ __forceinline__ void renew(const Room<W, ROWS>& room, uint32_t* flags) {
  const DecodeModel& m = room.m();
  const int n_blocks = room.a().n_frames * (m.plan_hop / m.past_hop);
  for (int block = 0; block < n_blocks; ++block) {
    const int played = block * m.past_hop;
    double* const lags = past_lags(room, played);
    if (threadIdx.x == 0) WAIT_FOR(&flags[PLAYED], uint32_t(played));
    __syncthreads();  // the samples are there
    renew_past(room, lags, played);
    if (played % m.plan_hop == 0) {
      const int k = played / m.plan_hop;
      // For those who play as well: what they wait for comes after it. The first barrier below tells the others of this block.
      if (threadIdx.x == 0) WAIT_FOR(&flags[PLANNED], uint32_t(k + 1));
      if (m.n_heard > 0) begin_tones(room, k % SLOTS, played);
    }
    if (threadIdx.x == 0) store_release(&flags[RENEWED], uint32_t(block + 1));
  }
}

/// Makes the plan's frames, as far ahead as there are slots.
template <class W, int ROWS>
__device__ __forceinline__ void plan(const Room<W, ROWS>& room, uint32_t* flags) {
  const DecodeArgs& a = room.a();
  for (int k = 0; k < a.n_frames; ++k) {
    if (a.make_plan) plan_frame(room, k);
    if (threadIdx.x == 0) room.block().fresh = false;
    if (threadIdx.x == 0 && k >= SLOTS) WAIT_FOR(&flags[PLAYED], uint32_t((k - SLOTS + 1) * room.m().plan_hop));
    // The frame that was in this slot has been played: the first barrier below tells the others, before they write to it.
    prepare_frame(room, k, k % SLOTS);
    if (threadIdx.x == 0) store_release(&flags[PLANNED], uint32_t(k + 1));
  }
  for (int r = threadIdx.x; r < room.n_rows(); r += blockDim.x)
    a.counters[4 * int64_t(room.rows()[r].stream) + 1] = room.rows()[r].plan_pos;
}

template <class W, int ROWS>
__device__ __forceinline__ void persistent(const DecodeArgs& a) {
  const int cluster = blockIdx.x / a.group_size, rank = blockIdx.x % a.group_size, roles = a.overlapped ? 3 : 1;
  const int role = cluster % roles, sets = (a.streams + ROWS - 1) / ROWS;
  if (role != PLAY && rank > 0) return;
  const Room<W, ROWS> room = {0};
  room.open(a, role == PLAY ? rank : 0, role == PLAY ? a.group_size : 1, role == PLAY);
  for (int set = cluster / roles; set < sets; set += a.groups) {
    uint32_t* const flags = a.flags + N_FLAGS * set;
    take(room, set);
    if (role == PLAY)
      play(room, flags, !a.overlapped);
    else if (role == RENEW)
      renew(room, flags);
    else
      plan(room, flags);
  }
}

// ---- entry points --------------------------------------------------------------------------------------------------

KERNEL(decode_persistent_f32_1, DecodeArgs, MAX_THREADS, persistent<float, 1>)
KERNEL(decode_persistent_f32_8, DecodeArgs, MAX_THREADS, persistent<float, 8>)
KERNEL(decode_persistent_bf16_1, DecodeArgs, MAX_THREADS, persistent<bf16, 1>)
KERNEL(decode_persistent_bf16_8, DecodeArgs, MAX_THREADS, persistent<bf16, 8>)

}  // namespace decode
