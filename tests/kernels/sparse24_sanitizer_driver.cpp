// Runs every kernel of kernels/sparse24/cpu.cpp (SOURCE is its path) on heap arrays of the exact sizes, for the sanitizers to watch.

#include <stdio.h>

#include <memory>
#include <vector>

#define KERNEL_SOURCE "driver"
#include SOURCE

namespace {

std::vector<uint8_t> numbers(Type type, int64_t count) {
  std::vector<uint8_t> out(size_t(count * type_size(type)));
  for (int64_t i = 0; i < count; i++)
    if (type == I8)
      out[size_t(i)] = uint8_t(i * 37 % 255 - 127);
    else
      store_float(type, out.data(), i, float(i * 37 % 101 - 50) / 16);
  return out;
}

bool run(int64_t columns, int64_t batch, Type x_type, Type value_type, Activation activation) {
  const int64_t rows[2] = {35, 3};
  const uint8_t codes[6] = {0x4, 0x8, 0x9, 0xC, 0xD, 0xE};
  std::vector<uint8_t> x = numbers(x_type, batch * columns), buffers[2][5];
  alignas(8) uint8_t memory[sizeof(Call) + sizeof(Matrix)] = {};
  Call& c = *new (memory) Call{};
  c.x = x.data(), c.x_pitch = columns * type_size(x_type), c.x_type = x_type, c.batch = batch, c.columns = columns;
  c.value_type = value_type, c.out_type = x_type, c.activation = activation, c.threads = 2, c.count = 2;
  for (int i = 0; i < 2; i++) {
    const bool dense = activation == DENSE_CONTROL;
    buffers[i][0] = numbers(value_type, rows[i] * columns / (dense ? 1 : 2));
    buffers[i][1].resize(size_t(rows[i] * ((columns + 7) / 8)));
    for (size_t j = 0; j < buffers[i][1].size(); j++) buffers[i][1][j] = uint8_t(codes[j % 6] | codes[j % 5] << 4);
    buffers[i][2] = numbers(F32, rows[i]);
    buffers[i][3] = numbers(F16, rows[i]);
    buffers[i][4].resize(size_t(batch * rows[i] * type_size(x_type)));
    Matrix& m = (&c.matrices[0])[i];
    m.values = buffers[i][0].data(), m.meta = buffers[i][1].data();
    m.scale = value_type == I8 ? reinterpret_cast<const float*>(buffers[i][2].data()) : nullptr;
    m.bias = buffers[i][3].data(), m.bias_type = F16, m.out = buffers[i][4].data(), m.rows = rows[i];
  }
  return sparse24_linear(&c) == OK;
}

// One token through two layers, on a cache that is full after it, and through a head.
bool run_decode(Type type, Type value_type, Activation activation) {
  const int64_t hidden = 36, heads = 3, kv_heads = 1, dim = 20, inner = 60, tokens = 5;
  const int64_t shapes[7][2] = {{heads * dim, hidden}, {kv_heads * dim, hidden}, {kv_heads * dim, hidden}, {hidden, heads * dim},
                                {inner, hidden},       {inner, hidden},          {hidden, inner}};
  std::vector<uint8_t> kept[2][7][4];
  std::vector<uint8_t> norm = numbers(F32, hidden), head_norm = numbers(BF16, dim), x = numbers(type, hidden), angles = numbers(type, dim);
  std::vector<uint8_t> wide_norm = numbers(BF16, hidden), cache = numbers(type, 2 * 2 * kv_heads * (tokens + 1) * dim), out(x.size());
  decode::Layer layers[2] = {};
  for (int l = 0; l < 2; l++) {
    Matrix* matrices = &layers[l].q;
    for (int i = 0; i < 7; i++) {
      auto& k = kept[l][i];
      const int64_t rows = shapes[i][0], columns = shapes[i][1];
      k[0] = numbers(value_type, rows * columns / 2);
      k[1].assign(size_t(rows * ((columns + 7) / 8)), 0x94);
      k[2] = numbers(F32, rows), k[3] = numbers(F16, rows);
      matrices[i] = {k[0].data(), k[1].data(), value_type == I8 ? reinterpret_cast<const float*>(k[2].data()) : nullptr,
                     k[3].data(), nullptr, rows, F16};
    }
    layers[l].input_norm = layers[l].post_norm = wide_norm.data();
    layers[l].q_norm = layers[l].k_norm = l ? head_norm.data() : nullptr;
  }
  decode::Token t{};
  t.layers = layers, t.count = 2, t.hidden = hidden, t.heads = heads, t.kv_heads = kv_heads, t.head_dim = dim, t.intermediate = inner;
  t.type = type, t.norm_type = BF16, t.value_type = value_type, t.activation = activation, t.eps = 1e-5, t.scaling = 0.2;
  t.norm = wide_norm.data(), t.x = x.data(), t.cos = t.sin = angles.data(), t.cache = cache.data(), t.capacity = tokens + 1;
  t.tokens = tokens, t.out = out.data(), t.threads = 2;
  if (sparse24_decode_token(&t) != OK) return false;
  bool fine = true;
  for (Type weight_type : {type, I8})
    for (int64_t count : {1, 3}) {
      std::vector<uint8_t> rows = numbers(type, count * hidden), weight = numbers(weight_type, 301 * hidden), bias = numbers(type, 301);
      std::vector<uint8_t> scale = numbers(F32, 301), logits(size_t(count * 301 * type_size(type)));
      const float* scales = weight_type == I8 ? reinterpret_cast<const float*>(scale.data()) : nullptr;
      const decode::Dense head{rows.data(), weight.data(), scales, bias.data(), logits.data(), count, 301, hidden, type, weight_type, type, 2};
      fine = fine && sparse24_dense_tokens(&head) == OK;
    }
  return fine;
}

}  // namespace

int main() {
  const int levels[] = {0, AVX2, AVX2 | AVX512, AVX2 | AVX512 | AVX512_BF16 | AVX512_VNNI, ~0};
  int cases = 0;
  for (int level : levels) {
    sparse24_use_features(level);
    for (int64_t columns : {4, 12, 60, 516, 772})
      for (int64_t batch : {1, 2, 5, 17, 33, 70})
        for (Type value_type : {F32, BF16, F16, I8}) {
          const Type x_type = Type(cases % 3);
          if (!run(columns, batch, x_type, value_type, FLOAT_ACTIVATION) || !run(columns, batch, BF16, value_type, FLOAT_ACTIVATION)) return 1;
          if (value_type == I8 && !run(columns, batch, x_type, I8, INT8_ACTIVATION)) return 1;
          if (value_type == BF16 && batch < 33 && !run(columns, batch, BF16, BF16, DENSE_CONTROL)) return 1;
          cases++;
        }
    for (Type type : {F32, BF16, F16})
      for (Type value_type : {F32, BF16, F16, I8}) {
        if (!run_decode(type, value_type, FLOAT_ACTIVATION)) return 1;
        if (value_type == I8 && !run_decode(type, I8, INT8_ACTIVATION)) return 1;
        cases++;
      }
  }
  std::vector<uint8_t> memory(5000);
  sparse24_read(memory.data(), 5000, 2);
  printf("checked %d cases\n", cases);
}
