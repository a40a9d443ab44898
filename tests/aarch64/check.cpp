// The CPU library's C interface against the definitions in float64, in plain loops: forward, backward and
// training step, for every mask, direction and kind of number.
//
// tools/check_aarch64.py compiles it for each instruction set of this machine and, with a cross compiler, for
// aarch64. Nothing but the structures is shared with the library. A quantity may be wrong by `kRoundings`
// units of rounding of the sum of the magnitudes of its terms, times 1 + the inverse temperature, which
// multiplies the rounding of cosines: about what the same loops in float32 lose. In float64 it is twice that,
// since the definitions are as wrong themselves.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/problem.hpp"

using nckernels::Exclude, nckernels::Gradients, nckernels::Half, nckernels::Problem, nckernels::Step;

extern "C" {
int32_t nckernels_forward(const Problem*);
int32_t nckernels_backward(const Problem*, const Gradients*);
int32_t nckernels_step(const Problem*, const Step*);
}

namespace {

constexpr int64_t kIgnored = -100;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kRoundings = 8;
constexpr double kUnderflow = 1e-30;  // exponentials that float32 may hold as 0, over its rounding

// --- kinds of numbers --------------------------------------------------------------------------------------

// What features are stored as, what the library computes in, what a number means, the least norm, and what
// entries of the gradient may lose beside the rounding of `Result`.
template <class T>
struct Full {
  using Stored = T;
  using Result = T;
  static constexpr Half half = nckernels::kFull;
  static constexpr double eps = 1e-12, entries = 0;
  static double value(T x) { return x; }
  static T stored(double x) { return static_cast<T>(x); }
};
struct Float64 : Full<double> {
  static constexpr const char* name = "float64";
};
struct Float32 : Full<float> {
  static constexpr const char* name = "float32";
};

// A sign, exponent bits and `MANTISSA` further bits. Drawn numbers are cut off, not rounded.
template <int MANTISSA, int BIAS>
struct Sixteen {
  using Stored = uint16_t;
  using Result = float;
  static double value(uint16_t h) {
    const int exponent = (h & 0x7fff) >> MANTISSA, mantissa = h & ((1 << MANTISSA) - 1);
    const double x = exponent ? std::ldexp((1 << MANTISSA) + mantissa, exponent - BIAS - MANTISSA)
                              : std::ldexp(mantissa, 1 - BIAS - MANTISSA);
    return h & 0x8000 ? -x : x;
  }
  static uint16_t stored(double x) {
    if (std::isnan(x)) return 0x7fff;
    if (x == 0) return 0;
    const int exponent = std::max(std::ilogb(x), 1 - BIAS);  // of subnormal numbers too
    const auto digits = static_cast<int>(std::ldexp(std::fabs(x), MANTISSA - exponent));
    // The leading digit of a normal number adds one to the exponent.
    return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) + ((exponent + BIAS - 1) << MANTISSA) + digits);
  }
};

struct Bfloat16 : Sixteen<7, 127> {
  static constexpr const char* name = "bfloat16";
  static constexpr Half half = nckernels::kBfloat16;
  static constexpr double eps = 1e-12, entries = 0;
};

// Of libraries that multiply bfloat16 as such: entries are rounded to it, once.
struct Bfloat16Entries : Bfloat16 {
  static constexpr const char* name = "bfloat16, entries rounded";
  static constexpr double entries = 0x1p-8;
};

struct Float16 : Sixteen<10, 15> {
  static constexpr const char* name = "float16";
  static constexpr Half half = nckernels::kFloat16;
  static constexpr double eps = 0x1p-14, entries = 0;
};

// --- a problem ---------------------------------------------------------------------------------------------

struct Case {
  int64_t m, k, d;
  bool by_class, by_instance;
  Exclude exclude;
  bool symmetric;
  double beta;
  int64_t workspace;
  bool step;
  uint64_t seed;
  bool planted = false;  // the formula leaves one entry out of its sums

  bool square() const { return exclude == nckernels::kSelf || exclude == nckernels::kSameLabel; }
};

std::string describe(const Case& c, const char* kind) {
  static const char* masks[] = {"none", "target", "self", "same_label"};
  char text[200];
  std::snprintf(text, sizeof text, "%s %s M=%d K=%d d=%d%s%s exclude=%s%s beta=%g workspace=%d seed=%d", kind,
                c.step ? "step" : "forward and backward", int(c.m), int(c.k), int(c.d),
                c.by_class ? " class" : "", c.by_instance ? " instance" : "", masks[c.exclude],
                c.symmetric ? " symmetric" : "", c.beta, int(c.workspace), int(c.seed));
  return text;
}

// Everything that is drawn for a problem. Rows that take no part are NaN: nobody may look at them.
template <class Kind>
struct Drawn {
  using T = typename Kind::Result;
  std::vector<typename Kind::Stored> z, w;
  int64_t z_stride, w_stride;
  std::vector<int64_t> target;
  std::vector<T> sample_bias, class_bias, weight;  // empty where there are none
  bool present_only, mean;
  int threads;
  double empty;

  explicit Drawn(const Case& c) : random_(c.seed) {
    const int64_t labels = c.symmetric && c.step                ? std::max<int64_t>(1, c.m / 3)
                           : c.exclude == nckernels::kSameLabel ? std::max<int64_t>(1, c.m / 4)
                                                                : c.k;
    target.resize(c.m);
    const bool all_ignored = chance(40);
    for (int64_t& y : target) y = all_ignored || chance(9) ? kIgnored : int64_t(random_() % labels);
    present_only = c.by_class && !c.by_instance && !c.square() && (c.step || chance(2));
    z_stride = c.d + (chance(2) ? 3 : 0);
    w_stride = c.symmetric ? z_stride : c.d + (chance(2) ? 1 : 0);
    threads = chance(2) ? 2 : 1;
    mean = !chance(3);
    empty = chance(2) ? 0.0 : kNaN;
    std::vector<char> z_read(c.m), w_read(c.k, !present_only && !c.square());
    for (int64_t j = 0; j < c.m; j++)
      if (target[j] != kIgnored) {
        z_read[j] = 1;
        if (c.square()) w_read[j] = 1;
        if (!(c.symmetric && c.step) && c.exclude != nckernels::kSameLabel) w_read[target[j]] = 1;
      }
    if (c.symmetric) {
      for (int64_t j = 0; j < c.m; j++) z_read[j] = w_read[j];
      w_read.clear();
    }
    z = rows(z_read, c.d, z_stride);
    w = rows(w_read, c.d, w_stride);
    if (!c.step && c.by_class && !c.symmetric && chance(2)) sample_bias = biases(c.m);
    if (!c.step && c.by_instance && !c.symmetric && chance(2)) class_bias = biases(c.k);
    if (c.step && chance(2)) {
      weight.resize(c.m);
      for (T& x : weight) x = chance(5) ? T(0) : static_cast<T>(std::fabs(normal_(random_)) + 0.1);
    }
  }

  std::vector<T> upstream(int64_t n) {
    std::vector<T> g(n);
    for (T& x : g) x = static_cast<T>(normal_(random_));
    return g;
  }

 private:
  bool chance(int one_in) { return random_() % one_in == 0; }

  std::vector<typename Kind::Stored> rows(const std::vector<char>& read, int64_t d, int64_t stride) {
    std::vector<typename Kind::Stored> x(read.size() * stride, Kind::stored(kNaN));
    for (size_t j = 0; j < read.size(); j++) {
      // A few rows are zero, or so short that their norm is clamped; in 16 bits these numbers are subnormal.
      const double scale = chance(25) ? 0 : chance(25) ? Kind::eps / 100 : 1;
      for (int64_t i = 0; i < d && read[j]; i++) x[j * stride + i] = Kind::stored(scale * normal_(random_));
    }
    return x;
  }

  std::vector<T> biases(int64_t n) {
    std::vector<T> b = upstream(n);
    b[random_() % n] = -std::numeric_limits<T>::infinity();
    return b;
  }

  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
};

// --- the definitions ---------------------------------------------------------------------------------------

using Doubles = std::vector<double>;

template <class V>
Doubles doubles(const V& x) {
  return Doubles(x.begin(), x.end());
}

// Rows of a result, and for each row the sum of the magnitudes of the terms of one number.
struct Sum {
  Doubles value, magnitude;

  explicit Sum(int64_t rows, int64_t d = 1) : value(rows * d), magnitude(rows) {}
  void add(int64_t i, double term, double size) { value[i] += term, magnitude[i] += size; }
};

// Unit rows, and what normalisation does to gradients.
struct Unit {
  int64_t d;
  Doubles rows, rnorm, radial;
  std::vector<char> clamped;  // rows whose norm is the constant eps instead of their own

  template <class Kind>
  Unit(Kind, const std::vector<typename Kind::Stored>& x, int64_t stride, int64_t n, int64_t d)
      : d(d), rows(n * d), rnorm(n), radial(n), clamped(n) {
    for (int64_t j = 0; j < n; j++) {
      double squares = 0;
      for (int64_t i = 0; i < d; i++) {
        rows[j * d + i] = Kind::value(x[j * stride + i]);
        squares += rows[j * d + i] * rows[j * d + i];
      }
      clamped[j] = std::sqrt(squares) < Kind::eps;
      rnorm[j] = 1 / (clamped[j] ? Kind::eps : std::sqrt(squares));
      for (int64_t i = 0; i < d; i++) rows[j * d + i] *= rnorm[j];
    }
  }

  // To the gradient of row j that of `factor` times its cosine with the unit row `other`, which is s.
  void add(int64_t j, double factor, double s, double size, Sum& gradient, const double* other) {
    for (int64_t i = 0; i < d; i++) gradient.value[j * d + i] += factor * rnorm[j] * other[i];
    gradient.magnitude[j] += size * rnorm[j];
    if (!clamped[j]) radial[j] += factor * rnorm[j] * s;
  }

  // Once all is added: what points along a row does not change it.
  void finish(Sum& gradient) const {
    for (size_t i = 0; i < rows.size(); i++)
      if (radial[i / d]) gradient.value[i] -= radial[i / d] * rows[i];
  }
};

class Formula {
 public:
  template <class Kind>
  Formula(Kind kind, const Case& c, const Drawn<Kind>& x)
      : class_lse(c.k, -kInfinity),
        instance_lse(c.m, -kInfinity),
        pos(c.m),
        z(c.m, c.d),
        w(c.k, c.d),
        sample_bias(c.m),
        class_bias(c.k),
        beta(1),
        c_(c),
        target_(x.target),
        u_(kind, x.z, x.z_stride, c.m, c.d),
        v_(kind, c.symmetric ? x.z : x.w, x.w_stride, c.k, c.d),
        cosine_(c.m * c.k),
        positive_(c.m * c.k),
        sample_bias_(x.sample_bias.empty() ? Doubles(c.m) : doubles(x.sample_bias)),
        class_bias_(x.class_bias.empty() ? Doubles(c.k) : doubles(x.class_bias)) {
    present_.assign(c.k, !x.present_only);
    for (int64_t j = 0; j < c.m; j++) {
      if (ignored(j)) continue;
      if (x.present_only) present_[target_[j]] = 1;
      for (int64_t i = 0; i < c.k; i++) {
        double s = 0;
        for (int64_t r = 0; r < c.d; r++) s += u_.rows[j * c.d + r] * v_.rows[i * c.d + r];
        cosine_[j * c.k + i] = s;
      }
      find_positives(j);
    }
    if (c.planted) plant();
    if (c.by_class)
      for (int64_t i = 0; i < c.k; i++)
        class_lse[i] = logsumexp(c.m, [&](int64_t j) { return term(j, i, sample_bias_[j]); });
    if (c.by_instance)
      for (int64_t j = 0; j < c.m; j++)
        instance_lse[j] = logsumexp(c.k, [&](int64_t i) { return term(j, i, class_bias_[i]); });
    for (int64_t j = 0; j < c.m; j++)
      for (int64_t i = 0; i < c.k; i++)
        if (positive_[j * c.k + i]) pos[j] += positive_[j * c.k + i] * c.beta * cosine_[j * c.k + i];
  }

  // What flows back to the log-sum-exps and the positives, and from there to everything else.
  void backward(const Doubles& of_class, const Doubles& of_instance, const Doubles& of_pos) {
    for (int64_t j = 0; j < c_.m; j++) {
      for (int64_t i = 0; i < c_.k; i++) {
        const double by_class = c_.by_class ? share(j, i, sample_bias_[j], class_lse[i]) * of_class[i] : 0;
        const double by_instance =
            c_.by_instance ? share(j, i, class_bias_[i], instance_lse[j]) * of_instance[j] : 0;
        const double by_pos = positive_[j * c_.k + i] * of_pos[j];
        if (by_class) sample_bias.add(j, by_class, std::fabs(by_class) + kUnderflow);
        if (by_instance) class_bias.add(i, by_instance, std::fabs(by_instance) + kUnderflow);
        const double size = std::fabs(by_class) + std::fabs(by_instance) + std::fabs(by_pos);
        if (size) entry(j, i, by_class + by_instance + by_pos, size + kUnderflow);
      }
    }
    u_.finish(z);
    v_.finish(c_.symmetric ? z : w);
  }

  // The loss of a training step, with its gradients, which are not for looking at if it is NaN.
  double step(const Doubles& weight, bool mean, double empty) {
    double total = 0, loss = 0;
    for (int64_t j = 0; j < c_.m; j++) total += counts(j) ? weight[j] : 0;
    const double scale = !mean ? 1 : total ? 1 / total : empty;
    const double half = c_.by_class && c_.by_instance ? 0.5 : 1;
    Doubles of_class(c_.k), of_instance(c_.m), of_pos(c_.m);
    for (int64_t j = 0; j < c_.m; j++) {
      if (!counts(j)) continue;
      const int64_t own = c_.symmetric ? j : target_[j];
      const double lse =
          (c_.by_class ? finite(class_lse[own]) : 0) + (c_.by_instance ? finite(instance_lse[j]) : 0);
      loss += scale * weight[j] * (half * lse - pos[j]);
      of_class[own] += scale * half * weight[j];
      of_instance[j] = scale * half * weight[j];
      of_pos[j] = -scale * weight[j];
    }
    backward(of_class, of_instance, of_pos);
    return mean && !total ? empty : loss;
  }

  bool planted() const { return planted_row_ >= 0; }

  Doubles class_lse, instance_lse, pos;
  Sum z, w, sample_bias, class_bias, beta;

 private:
  bool ignored(int64_t j) const { return target_[j] == kIgnored; }

  // In a symmetric step, samples without another one of their label do not count.
  bool counts(int64_t j) const {
    for (int64_t i = 0; i < c_.k; i++)
      if (positive_[j * c_.k + i]) return true;
    return false;
  }

  void find_positives(int64_t j) {
    double* row = &positive_[j * c_.k];
    if (!(c_.symmetric && c_.step)) {
      row[c_.exclude == nckernels::kSameLabel ? j : target_[j]] = 1;
      return;
    }
    double others = 0;
    for (int64_t i = 0; i < c_.m; i++) others += row[i] = i != j && target_[i] == target_[j];
    for (int64_t i = 0; i < c_.m; i++) row[i] /= std::max(others, 1.0);
  }

  // Forgets the last entry of the sums.
  void plant() {
    for (int64_t j = 0; j < c_.m; j++)
      for (int64_t i = 0; i < c_.k; i++)
        if (allowed(j, i) && sample_bias_[j] + class_bias_[i] > -kInfinity)
          planted_row_ = j, planted_column_ = i;
  }

  bool allowed(int64_t j, int64_t i) const {
    if (ignored(j) || !present_[i] || (c_.square() && ignored(i))) return false;
    switch (c_.exclude) {
      case nckernels::kTarget:
        return i != target_[j];
      case nckernels::kSelf:
        return i != j;
      case nckernels::kSameLabel:
        return target_[i] != target_[j];
      default:
        return true;
    }
  }

  double term(int64_t j, int64_t i, double bias) const {
    if (j == planted_row_ && i == planted_column_) return -kInfinity;
    return allowed(j, i) ? c_.beta * cosine_[j * c_.k + i] + bias : -kInfinity;
  }

  double share(int64_t j, int64_t i, double bias, double lse) const {
    const double t = term(j, i, bias);
    return t == -kInfinity ? 0 : std::exp(t - lse);
  }

  static double finite(double lse) { return lse == -kInfinity ? 0 : lse; }

  template <class F>
  static double logsumexp(int64_t n, F&& term) {
    double largest = -kInfinity, sum = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, term(i));
    if (largest == -kInfinity) return largest;
    for (int64_t i = 0; i < n; i++) sum += std::exp(term(i) - largest);
    return largest + std::log(sum);
  }

  // dL/dt of one logit.
  void entry(int64_t j, int64_t i, double a, double size) {
    const double s = cosine_[j * c_.k + i], *u = &u_.rows[j * c_.d], *v = &v_.rows[i * c_.d];
    Sum& of_v = c_.symmetric ? z : w;
    beta.add(0, a * s, size);
    u_.add(j, a * c_.beta, s, size * c_.beta, z, v);
    v_.add(i, a * c_.beta, s, size * c_.beta, of_v, u);
  }

  const Case& c_;
  const std::vector<int64_t>& target_;
  std::vector<char> present_;
  int64_t planted_row_ = -1, planted_column_ = -1;
  Unit u_, v_;
  Doubles cosine_, positive_, sample_bias_, class_bias_;
};

// --- the comparison ----------------------------------------------------------------------------------------

// The largest error so far, in units of what is allowed; above 1 is wrong, and NaN counts as infinite.
struct Worst {
  double share = 0;
  const char* of = "";

  void see(const char* name, double found, double wanted, double allowed) {
    if (found == wanted) return;
    double error = std::fabs(found - wanted) / allowed;
    if (!(error <= kInfinity)) error = kInfinity;
    if (error > share) share = error, of = name;
  }
};

template <class Kind>
class Comparison {
  using T = typename Kind::Result;

 public:
  explicit Comparison(const Case& c) : c_(c), x_(c), formula_(Kind{}, c, x_) {
    p_.m = c.m, p_.k = c.k, p_.d = c.d;
    p_.z_stride = x_.z_stride, p_.w_stride = x_.w_stride;
    p_.z = x_.z.data();
    p_.w = c.symmetric ? p_.z : x_.w.data();
    p_.target = x_.target.data();
    p_.sample_bias = pointer(x_.sample_bias);
    p_.class_bias = pointer(x_.class_bias);
    p_.ignore_index = kIgnored, p_.workspace = c.workspace;
    p_.beta = c.beta;
    p_.by_class = c.by_class, p_.by_instance = c.by_instance;
    p_.exclude = c.exclude, p_.present_only = x_.present_only, p_.symmetric = c.symmetric;
    p_.threads = x_.threads, p_.is_double = sizeof(T) == 8, p_.half = Kind::half;
    p_.eps = Kind::eps;
  }

  bool planted() const { return formula_.planted(); }

  Worst run() {
    if (c_.step)
      step();
    else
      forward_and_backward();
    return worst_;
  }

 private:
  static T* pointer(std::vector<T>& x) { return x.empty() ? nullptr : x.data(); }

  // Room for results that must all be written.
  static std::vector<T> unwritten(int64_t n) { return std::vector<T>(n, T(kNaN)); }

  double rounding() const {
    return std::numeric_limits<T>::epsilon() * (sizeof(T) == 8 ? 2 : 1) * kRoundings * (1 + c_.beta);
  }

  void done(int32_t status) {
    if (status != nckernels::kOk) worst_.see("status", status, 0, 0.5);
  }

  void compare(const char* name, const std::vector<T>& found, const Doubles& wanted) {
    for (size_t i = 0; i < found.size(); i++) worst_.see(name, double(found[i]), wanted[i], rounding());
  }

  void compare(const char* name, const std::vector<T>& found, const Sum& wanted) {
    for (size_t i = 0; i < found.size(); i++)
      worst_.see(name, double(found[i]), wanted.value[i],
                 (rounding() + Kind::entries) * wanted.magnitude[i * wanted.magnitude.size() / found.size()]);
  }

  void forward_and_backward() {
    // Room for all exponentials, for some, for none.
    const int64_t kept_size = c_.seed % 3 == 0 ? 0 : (c_.m + 191) * (c_.k + 223) / (c_.seed % 3);
    std::vector<T> class_lse = unwritten(c_.by_class ? c_.k : 0), pos = unwritten(c_.m);
    std::vector<T> instance_lse = unwritten(c_.by_instance ? c_.m : 0), kept = unwritten(kept_size);
    std::vector<T> z_rnorm = unwritten(c_.m), w_rnorm = unwritten(c_.k);
    p_.class_lse = pointer(class_lse), p_.instance_lse = pointer(instance_lse), p_.pos = pos.data();
    p_.z_rnorm = z_rnorm.data(), p_.w_rnorm = w_rnorm.data();
    p_.kept = pointer(kept), p_.kept_size = kept_size;
    done(nckernels_forward(&p_));
    compare("class_lse", class_lse, formula_.class_lse);
    compare("instance_lse", instance_lse, formula_.instance_lse);
    compare("pos", pos, formula_.pos);

    std::vector<T> of_class = x_.upstream(c_.k), of_instance = x_.upstream(c_.m), of_pos = x_.upstream(c_.m);
    std::vector<T> z = unwritten(c_.m * c_.d), w = prototypes();
    std::vector<T> sample_bias(x_.sample_bias.size()), class_bias(x_.class_bias.size());
    std::vector<double> beta(1);
    Gradients g{};
    g.class_lse = c_.by_class ? of_class.data() : nullptr;
    g.instance_lse = c_.by_instance ? of_instance.data() : nullptr;
    g.pos = of_pos.data();
    g.z = z.data(), g.w = pointer(w);
    g.sample_bias = pointer(sample_bias), g.class_bias = pointer(class_bias);
    g.beta = beta.data();
    done(nckernels_backward(&p_, &g));
    formula_.backward(doubles(of_class), doubles(of_instance), doubles(of_pos));
    gradients(z, w, beta);
    compare("sample_bias", sample_bias, formula_.sample_bias);
    compare("class_bias", class_bias, formula_.class_bias);
  }

  void step() {
    std::vector<T> loss = unwritten(1), z = unwritten(c_.m * c_.d), w = prototypes();
    std::vector<double> beta(1);
    Step s{};
    s.weight = pointer(x_.weight);
    s.loss = loss.data();
    s.z = z.data(), s.w = pointer(w), s.beta = beta.data();
    s.empty = x_.empty, s.mean = x_.mean;
    done(nckernels_step(&p_, &s));
    const Doubles weight = x_.weight.empty() ? Doubles(c_.m, 1.0) : doubles(x_.weight);
    const double wanted = formula_.step(weight, x_.mean, x_.empty);
    if (std::isnan(wanted) && std::isnan(loss[0])) return;
    double size = 1;
    if (!x_.mean)
      for (double one : weight) size += one;
    worst_.see("loss", double(loss[0]), wanted, rounding() * size);
    gradients(z, w, beta);
    if (p_.half == nckernels::kBfloat16 && !c_.symmetric) rounded(s, z, w);
  }

  // Gradients that the step rounds are those that it does not round, rounded here.
  void rounded(Step s, const std::vector<T>& z, const std::vector<T>& w) {
    std::vector<uint16_t> z_bits(z.size()), w_bits(w.size());
    s.z = z_bits.data(), s.w = w_bits.data(), s.rounded = 1;
    done(nckernels_step(&p_, &s));
    for (size_t i = 0; i < z.size(); i++) same_bits(z_bits[i], z[i]);
    for (size_t i = 0; i < w.size(); i++) same_bits(w_bits[i], w[i]);
  }

  void same_bits(uint16_t found, T wanted) {
    if (found != nckernels::to_bfloat16(static_cast<float>(wanted))) worst_.see("rounded", found, wanted, 0);
  }

  // Classes that do not occur are not written.
  std::vector<T> prototypes() const {
    if (c_.symmetric) return {};
    return std::vector<T>(c_.k * c_.d, x_.present_only ? T(0) : T(kNaN));
  }

  void gradients(const std::vector<T>& z, const std::vector<T>& w, const std::vector<double>& beta) {
    compare("z", z, formula_.z);
    compare("w", w, formula_.w);
    worst_.see("beta", beta[0], formula_.beta.value[0],
               (rounding() + Kind::entries) * formula_.beta.magnitude[0]);
  }

  Case c_;
  Drawn<Kind> x_;
  Formula formula_;
  Problem p_{};
  Worst worst_;
};

// --- all problems ------------------------------------------------------------------------------------------

struct Mask {
  bool by_class, by_instance;
  Exclude exclude;
  bool symmetric, step;
};

std::vector<Mask> masks() {
  std::vector<Mask> all;
  const bool directions[3][2] = {{true, false}, {false, true}, {true, true}};
  for (auto [by_class, by_instance] : directions) {
    for (Exclude exclude : {nckernels::kNone, nckernels::kTarget})
      for (bool step : {false, true}) all.push_back({by_class, by_instance, exclude, false, step});
    for (Exclude exclude : {nckernels::kSelf, nckernels::kSameLabel}) {
      all.push_back({by_class, by_instance, exclude, false, false});
      if (by_class && by_instance) continue;
      for (bool step : {false, true}) all.push_back({by_class, by_instance, exclude, true, step});
    }
  }
  return all;
}

// Ragged in every size; few classes and many; one with work for two threads.
constexpr int64_t kShapes[][3] = {{1, 2, 3},     {7, 3, 5},     {61, 8, 70},   {29, 90, 64},
                                  {33, 10, 17},  {50, 40, 129}, {64, 33, 31},  {200, 12, 8},
                                  {130, 70, 19}, {3, 1, 1},     {300, 160, 36}};

template <class F>
void each_case(F&& run) {
  uint64_t seed = 0;
  for (const Mask& mask : masks())
    for (const auto& [m, k, d] : kShapes)
      for (double beta : {2.0, 10.0, 60.0})
        for (int64_t workspace : {int64_t(1) << 14, int64_t(1) << 25}) {
          if (m == 300 && beta != 10) continue;  // enough of what takes most of the time
          const bool square = mask.exclude == nckernels::kSelf || mask.exclude == nckernels::kSameLabel;
          run(Case{m, square ? m : k, d, mask.by_class, mask.by_instance, mask.exclude, mask.symmetric, beta,
                   workspace, mask.step, seed++});
        }
}

template <class Kind>
bool check() {
  int count = 0, wrong = 0;
  Worst worst;
  each_case([&](const Case& c) {
    // 16 bits differ from float32 in how rows are read.
    if (Kind::half && (c.m == 300 || c.beta == 60)) return;
    const Worst found = Comparison<Kind>(c).run();
    count++;
    if (found.share > worst.share) worst = found;
    if (found.share <= 1) return;
    if (wrong++ < 20)
      std::printf("WRONG %s: %s, %.2g of what is allowed\n", describe(c, Kind::name).c_str(), found.of,
                  found.share);
  });
  std::printf("%s: %d problems, %d wrong; largest error %.2f of what is allowed (%s)\n", Kind::name, count,
              wrong, worst.share, worst.of);
  return wrong == 0;
}

// The comparison notices one entry of the matrix that is missing from the sums.
bool notices() {
  int count = 0, noticed = 0;
  each_case([&](Case c) {
    if (c.m < 7 || c.m > 64 || c.beta > 2) return;  // exponentials of one size
    c.planted = true;
    Comparison<Float32> comparison(c);
    if (!comparison.planted()) return;
    count++;
    noticed += comparison.run().share > 1;
  });
  std::printf("a missing entry is noticed in %d of %d problems\n", noticed, count);
  return 20 * noticed >= 19 * count;  // in others the weight of the sample, and so of the entry, is 0
}

}  // namespace

// Runs the parts that are named.
int main(int argc, char** argv) {
  const std::map<std::string, bool (*)()> parts = {
      {"float64", check<Float64>},   {"float32", check<Float32>},
      {"bfloat16", check<Bfloat16>}, {"bfloat16_entries", check<Bfloat16Entries>},
      {"float16", check<Float16>},   {"planted", notices}};
#if defined(__x86_64__)
  syscall(SYS_arch_prctl, 0x1023,
          18);  // AMX: permission for tiles, as torch asks for it; without AMX an error
#endif
  bool right = argc > 1;
  for (int i = 1; i < argc; i++) right = parts.at(argv[i])() && right;
  return right ? 0 : 1;
}
