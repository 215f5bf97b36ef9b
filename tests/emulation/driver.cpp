// Runs one case of csrc/cuda on the emulator: driver CASE RESULT. CASE is a text header ("key value ..." lines up to
// "end") followed by raw arrays; RESULT gets the raw outputs, one set a seed. The plan and what was launched go to
// standard output as "key value" lines. See emulator.py for the other side.
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "common/element.cuh"
#include "gradient/launch.h"
#include "regimes.h"

namespace {

using namespace inverse_flow;
using Bytes = std::unique_ptr<unsigned char[]>;

struct Case {
  std::map<std::string, std::vector<int64_t>> numbers;
  std::ifstream file;

  int64_t get(const std::string& key) const { return list(key).at(0); }
  const std::vector<int64_t>& list(const std::string& key) const {
    const auto found = numbers.find(key);
    if (found == numbers.end()) {
      std::cerr << "driver: the case has no " << key << "\n";
      std::exit(2);
    }
    return found->second;
  }
  Strides strides(const std::string& key) const {
    const auto& s = list(key);
    return {s.at(0), s.at(1), 0, s.at(2), s.at(3)};
  }
  // Memory of exactly this size, so that the sanitizer sees its ends.
  Bytes read(int64_t bytes) {
    Bytes data(new unsigned char[static_cast<size_t>(bytes)]);
    file.read(reinterpret_cast<char*>(data.get()), bytes);
    if (!file) {
      std::cerr << "driver: the case ends early\n";
      std::exit(2);
    }
    return data;
  }
};

Bytes poisoned(int64_t bytes) {
  Bytes data(new unsigned char[static_cast<size_t>(bytes)]);
  std::memset(data.get(), emulation::kPoison, static_cast<size_t>(bytes));
  return data;
}

void write(std::ofstream& result, const Bytes& data, int64_t bytes) {
  result.write(reinterpret_cast<const char*>(data.get()), bytes);
}

void check(const char* error) {
  if (error == nullptr) return;
  std::cerr << "driver: " << error << "\n";
  std::exit(4);
}

// A fact of a plan as a line, its name behind a prefix.
struct Print {
  std::string prefix;

  template <typename... Values>
  void operator()(std::string name, const Values&... values) const {
    std::replace(name.begin(), name.end(), '.', '_');
    std::cout << prefix << name;
    ((std::cout << ' ' << values), ...);
    std::cout << "\n";
  }
};

// The conversions of element.cuh and the emulation: all halves to float, and the given floats to halves.
template <typename Element>
void convert(Case& input, std::ofstream& result) {
  const int64_t count = input.get("count");
  const Bytes data = input.read(count * 4);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = to_state(Element{static_cast<uint16_t>(bits)});
    result.write(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  for (int64_t i = 0; i < count; ++i) {
    Element rounded;
    from_state(reinterpret_cast<const float*>(data.get())[i], rounded);
    result.write(reinterpret_cast<const char*>(&rounded), sizeof(rounded));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: driver CASE RESULT\n";
    return 2;
  }
  Case input;
  input.file.open(argv[1], std::ios::binary);
  std::string line;
  std::string operation;
  while (std::getline(input.file, line) && line != "end") {
    std::istringstream words(line);
    std::string key;
    words >> key;
    if (key == "operation") {
      words >> operation;
      continue;
    }
    auto& values = input.numbers[key];
    for (int64_t value = 0; words >> value;) values.push_back(value);
  }
  std::ofstream result(argv[2], std::ios::binary);
  if (operation == "convert_half") {
    convert<Half>(input, result);
    return 0;
  }
  if (operation == "convert_bfloat16") {
    convert<BFloat16>(input, result);
    return 0;
  }

  const std::vector<int64_t>& orders = input.list("orders");
  const auto image_type = static_cast<ElementType>(input.get("image_type"));
  const auto weight_type = static_cast<ElementType>(input.get("weight_type"));
  const bool is_half = element_bytes(image_type) == 2;
  const ElementType state_type = image_type == ElementType::kDouble ? ElementType::kDouble : ElementType::kFloat;
  const int64_t state_bytes = element_bytes(state_type);
  const bool transposed = input.get("transposed") != 0;
  Shape shape{input.get("batch"),
              static_cast<int64_t>(orders.size()),
              input.get("channels"),
              1,
              input.get("height"),
              input.get("width"),
              1,
              input.get("kernel_h"),
              input.get("kernel_w"),
              static_cast<Corner>(input.get("corner")),
              transposed};
  const DeviceLimits limits{static_cast<int32_t>(input.get("threads_per_block")), input.get("shared_bytes"),
                            static_cast<int32_t>(input.get("multiprocessors"))};
  const int64_t forced = input.get("forced_regime");
  const bool is_backward = operation == "backward";

  const auto plan =
      plan_solve(shape, state_bytes, limits, forced < 0 ? std::nullopt : std::optional(static_cast<size_t>(forced)));
  if (!plan.has_value()) {
    std::cerr << "driver: no plan\n";
    return 5;
  }
  // The regime's place in the variant; its name is for people.
  std::cout << "regime " << plan->index() << "\n";
  visit_plan(shape, *plan, state_bytes, [](const std::string& name, const auto&... values) {
    if (name != "regime") Print{""}(name, values...);
  });
  const GradientPlan gradient_plan = plan_weight_gradient(shape, state_bytes, limits);
  gradient_plan.visit(shape, Print{"gradient_"});
  if (operation == "plan") return 0;

  const int64_t image_bytes = element_bytes(image_type);
  const int64_t input_bytes = input.get("input_elements") * image_bytes;
  const int64_t output_bytes = input.get("output_elements") * image_bytes;
  const int64_t all_channels = shape.groups * shape.channels;
  const int64_t weight_bytes =
      all_channels * shape.channels * shape.kernel_h * shape.kernel_w * element_bytes(weight_type);
  const int64_t bias_bytes = all_channels * element_bytes(weight_type);
  const Bytes y = input.read(input_bytes);
  const Bytes weight = input.read(weight_bytes);
  const bool has_bias = input.get("has_bias") != 0;
  const Bytes bias = has_bias ? input.read(bias_bytes) : nullptr;
  // The solution whose gradient is asked for; laid out as the input.
  const Bytes x = is_backward ? input.read(input_bytes) : nullptr;

  for (const int64_t seed : input.list("seeds")) {
    emulation::device = {};
    emulation::device.planted = input.get("planted");
    emulation::device.random.seed(static_cast<uint64_t>(seed));
    const Bytes output = poisoned(output_bytes);
    const int64_t state_elements = shape.batch * all_channels * shape.height * shape.width;
    const bool with_state = is_half && (is_backward || state_needed(*plan));
    const Bytes state = with_state ? poisoned(state_elements * state_bytes) : nullptr;
    const Bytes workspace = poisoned(solve_workspace_bytes(shape, *plan, state_bytes));
    SolveProblem problem{};
    problem.shape = shape;
    // The gradient of a solve is first of all the opposite solve.
    problem.shape.transposed = transposed != is_backward;
    problem.orders = orders.data();
    problem.image_type = image_type;
    problem.input = y.get() + input.get("input_offset") * image_bytes;
    problem.input_strides = input.strides("input_strides");
    problem.output = output.get() + input.get("output_offset") * image_bytes;
    problem.output_strides = input.strides("output_strides");
    problem.weight = weight.get();
    problem.bias = bias.get();
    problem.weight_type = weight_type;
    problem.state = state.get();
    problem.workspace = workspace.get();
    problem.allow_tf32 = input.get("allow_tf32") != 0;
    check(launch_solve(problem, *plan, nullptr));
    const int64_t solve_launches = emulation::device.launches;
    write(result, output, output_bytes);
    if (is_backward) {
      const Bytes weight_gradient = poisoned(weight_bytes);
      const Bytes bias_gradient = poisoned(bias_bytes);
      const Bytes partials = poisoned(gradient_plan.workspace_elements(shape) * state_bytes);
      GradientProblem gradient{};
      gradient.shape = shape;
      gradient.orders = orders.data();
      gradient.output_type = image_type;
      gradient.output = x.get() + input.get("input_offset") * image_bytes;
      gradient.output_strides = input.strides("input_strides");
      gradient.adjoint_type = state_type;
      gradient.adjoint = with_state ? state.get() : problem.output;
      gradient.adjoint_strides = with_state ? contiguous_strides(shape) : problem.output_strides;
      gradient.weight_type = weight_type;
      gradient.weight_gradient = weight_gradient.get();
      gradient.bias_gradient = bias_gradient.get();
      gradient.workspace = partials.get();
      gradient.allow_tf32 = problem.allow_tf32;
      check(launch_gradient(gradient, gradient_plan, nullptr));
      write(result, weight_gradient, weight_bytes);
      write(result, bias_gradient, bias_bytes);
    }
    std::cout << "solve_launches " << solve_launches << "\nlaunches " << emulation::device.launches
              << "\nlargest_shared_bytes " << emulation::device.largest_shared_bytes << "\n";
  }
  return 0;
}
