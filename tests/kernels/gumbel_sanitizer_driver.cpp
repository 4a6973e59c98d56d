// Runs every case of kernels/gumbel/cpu.cpp (SOURCE is its path) on heap arrays of the exact sizes, for the sanitizers to watch.

#include <stdio.h>

#include <vector>

#include SOURCE

int main() {
  const int patterns[][3] = {{1, 4, 4}, {2, 4, 6}, {2, 8, 28}, {4, 8, 70}};
  const int64_t sizes[] = {0, 1, 17, 1030};
  int cases = 0;
  for (int isa = 0; isa < 3; isa++) {
    kernel_use_isa(isa);
    if (kernel_isa() != isa) continue;
    for (auto& p : patterns)
      for (int64_t groups : sizes)
        for (int flags = 0; flags < 32; flags++) {
          const int type = flags / 16 ? flags % 2 + 1 : 0;
          Call c{};
          c.scores = flags & 1, c.noise = flags >> 1 & 1, c.hard = flags >> 2 & 1, c.accumulate = flags >> 3 & 1;
          c.n = p[0], c.m = p[1], c.groups = groups, c.key = 0x9E3779B97F4A7C15u, c.tau = 0.1f, c.kappa = 100, c.threads = 2;
          c.first_group = (int64_t(1) << 32) / p[2] - 20;
          c.logits_type = c.weight_type = c.grad_type = c.out_type = type;
          const size_t bytes = size_of(type), width = size_t(c.scores ? p[1] : p[2]);
          std::vector<char> logits(bytes * groups * width, 3), weight(bytes * groups * p[1], 60), grad(weight), out(weight),
              back(logits);
          double norm;
          c.logits = logits.data(), c.weight = weight.data(), c.out = out.data(), c.norm = &norm;
          if (gumbel_masked_weight(&c)) return 1;
          c.grad = flags & 2 ? grad.data() : nullptr, c.grad_norm = 0.1f, c.out = back.data(), c.norm = nullptr;
          if (gumbel_masked_weight_backward(&c)) return 1;
          cases++;
        }
    std::vector<float> noise(37);
    gumbel_noise(7, (uint64_t(1) << 32) - 9, 37, noise.data());
  }
  printf("checked %d cases\n", cases);
}
