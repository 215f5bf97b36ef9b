// The CPU operators: share the work among torch's threads as plan.h says, and allocate.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../tensors.h"
#include "blocks.h"
#include "isa.h"
#include "plan.h"
#include "prepare.h"

namespace inverse_flow::cpu {

namespace {

// Working memory: pieces of as many bytes, each 64-byte-aligned. Taken before the threads start, since what fails
// within one reaches the caller without its message.
class Scratch {
 public:
  Scratch(int64_t pieces, size_t bytes) : piece_((bytes + 63) / 64 * 64) {
    const size_t all = std::max<size_t>(pieces * piece_, 64);
    memory_ = static_cast<char*>(std::aligned_alloc(64, all));
    if (!memory_) {
      throw std::runtime_error("out of memory: the solve needs " + std::to_string(all) + " bytes of working memory");
    }
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* piece(int64_t index) const { return memory_ + index * piece_; }

 private:
  size_t piece_;
  char* memory_;
};

// One group of images that follow each other, in the coordinates in which its solve starts at the top left.
template <class IO>
Image<IO> mirrored_group(const Shape& shape, IO* data, Strides stride, int64_t group, int32_t flips) {
  Image<IO> image{data + group * shape.channels * stride.channel, stride, data, data + 1};
  const auto span = [&](int64_t count, int64_t step) { (step < 0 ? image.begin : image.end) += (count - 1) * step; };
  span(shape.batch, stride.batch);
  span(shape.groups * shape.channels, stride.channel);
  span(shape.depth, stride.plane);
  span(shape.height, stride.row);
  span(shape.width, stride.column);
  if (flips & kMirrorPlanes) {
    image.data += (shape.depth - 1) * stride.plane;
    image.stride.plane = -stride.plane;
  }
  if (flips & kMirrorRows) {
    image.data += (shape.height - 1) * stride.row;
    image.stride.row = -stride.row;
  }
  if (flips & kMirrorColumns) {
    image.data += (shape.width - 1) * stride.column;
    image.stride.column = -stride.column;
  }
  return image;
}

// Solves all groups of shape.batch images from image `first_of_part` on; with `other` also adds up the weight and bias
// gradients (contiguous).
template <class IO, class T>
void run_part(const Shape& shape, int64_t first_of_part, const std::vector<int64_t>& orders,
              const Prepared<T>& prepared, const Tensor& input, const Tensor& output, const Tensor* other,
              T* weight_gradient, T* bias_gradient) {
  const bool with_gradient = other != nullptr;
  const Kernels<IO, T>& kernels = isa_in_use().kernels;
  const Plan plan = make_plan(shape, with_gradient, kernels, torch::stable::get_num_threads());

  std::vector<Problem<IO, T>> problems;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int32_t flips = solved_order(static_cast<int32_t>(orders[g]), shape.transposed);
    const auto view = [&](const Tensor& tensor, auto* data) {
      const Strides stride = strides_of(tensor);
      return mirrored_group(shape, data + first_of_part * stride.batch, stride, g, flips);
    };
    const auto read = [&](const Tensor& tensor) {
      return view(tensor, static_cast<const IO*>(tensor.const_data_ptr()));
    };
    problems.push_back({shape, prepared.group(shape, g), read(input),
                        view(output, static_cast<IO*>(output.mutable_data_ptr())),
                        with_gradient ? read(*other) : Image<const IO>{}, with_gradient});
  }

  // Every unit of work sums its gradients apart, and they are added up in a fixed order: the result does not depend
  // on which thread was faster.
  const SumSizes sizes = sum_sizes(shape, with_gradient);
  const size_t set_bytes = sizes.total() * sizeof(T);
  const Scratch sums(plan.sets, set_bytes);
  for (int64_t set = 0; set < plan.sets; ++set) std::memset(sums.piece(set), 0, set_bytes);
  const auto gradients = [&](int64_t set) {
    T* at = static_cast<T*>(sums.piece(set));
    return Gradients<T>{at, at + sizes.weight};
  };
  std::vector<int64_t> group_of_set(plan.sets, -1);
  size_t bytes = 0;
  for (const auto& problem : problems) bytes = std::max(bytes, thread_scratch(kernels, plan, problem));
  const int64_t jobs = plan.jobs;
  const Scratch scratch(plan.workers, bytes);

  if (plan.regime == Regime::kRows) {
    const int64_t halo = halo_elements(shape, plan);
    const Scratch halos(1, jobs * halo * sizeof(T));
    std::unique_ptr<std::atomic<int64_t>[]> steps_done(new std::atomic<int64_t>[jobs]);
    for (int64_t i = 0; i < jobs; ++i) steps_done[i].store(0, std::memory_order_relaxed);
    // Bands are claimed in order, so the band a claimed one waits for is always being worked on, whatever the
    // number of threads that really run.
    std::atomic<int64_t> next{0};
    const Bands<T> bands{plan.rows, &next, steps_done.get(), static_cast<T*>(halos.piece(0))};
    torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t job = next.fetch_add(1); job < jobs; job = next.fetch_add(1)) {
          const int64_t group = job / (shape.batch * plan.units);
          group_of_set[job] = group;
          kernels.rows(problems[group], bands, job, scratch.piece(begin), gradients(job));
        }
      }
    });
  } else if (plan.regime == Regime::kOutputs) {
    const int64_t units = shape.groups * plan.units;
    torch::stable::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        for (int64_t unit = units * job / jobs; unit < units * (job + 1) / jobs; ++unit) {
          const int64_t group = unit / plan.units;
          const int64_t first = shape.batch * (unit % plan.units) / plan.units;
          const int64_t last = shape.batch * (unit % plan.units + 1) / plan.units;
          const int64_t set = job + group;  // unique: both grow along the units
          group_of_set[set] = group;
          kernels.outputs(problems[group], plan.outputs, first, last - first, scratch.piece(begin), gradients(set));
        }
      }
    });
  } else {
    const int64_t units = shape.groups * plan.units;
    torch::stable::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t last = units * (job + 1) / jobs;
        for (int64_t unit = units * job / jobs; unit < last;) {
          const int64_t group = unit / plan.units;
          const int64_t left = std::min(last, (group + 1) * plan.units) - unit;
          const int64_t lanes = line_lanes(left, kernels.min_lanes, plan.lanes);
          const int64_t first = unit % plan.units * kernels.min_lanes;
          const int64_t set = job + group;  // unique: both grow along the units
          group_of_set[set] = group;
          kernels.images(problems[group], first, std::min(lanes, shape.batch - first), lanes, scratch.piece(begin),
                         gradients(set));
          unit += lanes / kernels.min_lanes;
        }
      }
    });
  }

  if (!with_gradient) return;
  for (int64_t set = 0; set < plan.sets; ++set) {
    const int64_t group = group_of_set[set];
    if (group < 0) continue;
    const Gradients<T> part = gradients(set);
    add_weight_gradient(shape, orders[group], part.weight, weight_gradient + group * sizes.weight);
    for (int64_t c = 0; c < shape.channels; ++c) bias_gradient[group * shape.channels + c] += part.bias[c];
  }
}

// Solves all groups; with `other` also adds up the weight and bias gradients (contiguous, zeroed).
template <class IO, class T>
void run(const Shape& shape, const std::vector<int64_t>& orders, const T* weight, const T* bias, const Tensor& input,
         const Tensor& output, const Tensor* other, T* weight_gradient, T* bias_gradient) {
  const KernelSet& set = isa_in_use().kernels;
  const Kernels<IO, T>& kernels = set;
  const int64_t threads = torch::stable::get_num_threads();
  const bool with_gradient = other != nullptr;
  // A singular M is an error of an empty batch, too. Only batches of one part have outputs as lanes.
  const Plan plan = shape.batch > 0 ? make_plan(shape, with_gradient, kernels, threads) : Plan{};
  const Prepared<T> prepared =
      plan.regime == Regime::kOutputs
          ? prepare_blocks(shape, orders, weight, bias, plan.outputs.block, kernels.block_lanes, set.prepare)
          : prepare(shape, orders, weight, bias, set.prepare);
  const int64_t first = first_part(shape, with_gradient, kernels, threads);
  Shape part = shape;
  for (int64_t begin = 0; begin < shape.batch; begin += part.batch) {
    part.batch = begin == 0 ? first : shape.batch - first;
    run_part<IO, T>(part, begin, orders, prepared, input, output, other, weight_gradient, bias_gradient);
  }
}

int64_t channel_count(const Shape& shape) { return shape.groups * shape.channels; }
int64_t weight_count(const Shape& shape) { return channel_count(shape) * shape.channels * shape.taps(); }

template <class T>
constexpr ScalarType kScalarType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Calls f with the half-precision type.
template <class F>
void with_half_type(ScalarType type, F f) {
  if (type == ScalarType::Half) return f(torch::headeronly::Half{});
  f(torch::headeronly::BFloat16{});
}

// A weight or bias in the state type: its memory, or a copy. torch's own conversion would take as long as a small
// solve.
template <class T>
class StateValues {
 public:
  StateValues(const Tensor& tensor, int64_t count) : memory_(as_contiguous(tensor)) {
    if (memory_.scalar_type() == kScalarType<T>) {
      data_ = static_cast<const T*>(memory_.const_data_ptr());
      return;
    }
    with_half_type(memory_.scalar_type(), [&](auto half) {
      const auto* from = static_cast<const decltype(half)*>(memory_.const_data_ptr());
      copy_.assign(from, from + count);
    });
    data_ = copy_.data();
  }
  const T* data() const { return data_; }

 private:
  Tensor memory_;
  std::vector<T> copy_;
  const T* data_;
};

// A gradient to be summed in the state type, from zero: in the tensor's memory, or beside it and rounded once.
template <class T>
class StateSums {
 public:
  StateSums(const Tensor& target, int64_t count)
      : target_(target), beside_(target.scalar_type() == kScalarType<T> ? 0 : count) {
    data_ = beside_.empty() ? static_cast<T*>(target.mutable_data_ptr()) : beside_.data();
    std::fill_n(data_, count, T(0));
  }
  T* data() const { return data_; }
  void finish() const {
    if (beside_.empty()) return;
    with_half_type(target_.scalar_type(), [&](auto half) {
      std::copy(beside_.begin(), beside_.end(), static_cast<decltype(half)*>(target_.mutable_data_ptr()));
    });
  }

 private:
  Tensor target_;
  std::vector<T> beside_;
  T* data_;
};

template <class IO, class T>
void solve_as(const Shape& shape, const std::vector<int64_t>& orders, const Tensor& input, const Tensor& weight,
              const std::optional<Tensor>& bias, const Tensor& output) {
  const StateValues<T> w(weight, weight_count(shape));
  std::optional<StateValues<T>> b;
  if (bias) b.emplace(*bias, channel_count(shape));
  run<IO, T>(shape, orders, w.data(), b ? b->data() : nullptr, input, output, nullptr, nullptr, nullptr);
}

template <class IO, class T>
void solve_backward_as(const Shape& shape, const std::vector<int64_t>& orders, const Tensor& grad_output,
                       const Tensor& output, const Tensor& weight, const Tensor& grad_input, const Tensor& grad_weight,
                       const Tensor& grad_bias) {
  const StateValues<T> w(weight, weight_count(shape));
  const StateSums<T> weight_sums(grad_weight, weight_count(shape));
  const StateSums<T> bias_sums(grad_bias, channel_count(shape));
  run<IO, T>(shape, orders, w.data(), nullptr, grad_output, grad_input, &output, weight_sums.data(), bias_sums.data());
  weight_sums.finish();
  bias_sums.finish();
}

// Calls f with the image type and the state type.
template <class F>
void for_types(ScalarType io, F f) {
  switch (io) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    case ScalarType::Half:
      return f(Float16{}, float{});
    default:
      return f(float{}, float{});
  }
}

Tensor solve(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<int64_t> orders,
             int64_t corner, bool transposed, bool /*allow_tf32*/) {
  const Shape shape = check_problem(input, weight, bias, orders, corner, transposed);
  const Tensor output = new_image_like(input);
  for_types(input.scalar_type(), [&](auto io, auto state) {
    solve_as<decltype(io), decltype(state)>(shape, orders, input, weight, bias, output);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> solve_backward(const Tensor& grad_output, const Tensor& output, const Tensor& weight,
                                                  std::vector<int64_t> orders, int64_t corner, bool transposed,
                                                  bool /*allow_tf32*/) {
  const Shape shape = check_problem(grad_output, weight, std::nullopt, orders, corner, !transposed);
  check_same_images(grad_output, output);
  const Tensor grad_input = new_image_like(grad_output);
  const ScalarType type = weight.scalar_type();
  const auto weight_sizes = weight.sizes();
  const Tensor grad_weight = new_tensor(weight, {weight_sizes.begin(), weight_sizes.end()}, type);
  const Tensor grad_bias = new_tensor(weight, {channel_count(shape)}, type);
  for_types(grad_output.scalar_type(), [&](auto io, auto acc) {
    solve_backward_as<decltype(io), decltype(acc)>(shape, orders, grad_output, output, weight, grad_input, grad_weight,
                                                   grad_bias);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

}  // namespace inverse_flow::cpu

STABLE_TORCH_LIBRARY_IMPL(inverse_flow, CPU, m) {
  m.impl("solve", TORCH_BOX(&inverse_flow::cpu::solve));
  m.impl("solve_eager", TORCH_BOX(&inverse_flow::cpu::solve));
  m.impl("solve_backward", TORCH_BOX(&inverse_flow::cpu::solve_backward));
  m.impl("solve_backward_eager", TORCH_BOX(&inverse_flow::cpu::solve_backward));
}
