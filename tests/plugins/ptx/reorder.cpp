//! \file reorder.cpp
//! What stands between an optimising assembler and the PTX: the order of instructions within a straight run of them.
//!
//! List scheduling by the longest way to the end of the run, for the timing model alone.

#include "machine.h"

#include <algorithm>

namespace ptx
{
namespace
{

constexpr double kAfterRead = 0.1; //!< A write waits for the reads before it, hardly.
constexpr double kAfterWrite = 1;

struct Edge
{
    size_t to;
    double cycles;
};

double assumedLatency(Instruction const& in)
{
    constexpr double kShared = 29;
    constexpr double kGeneric = 36;
    constexpr double kGlobal = 270;
    constexpr double kAtomic = 60;
    if (in.opcode == Opcode::kLD && in.space != Space::kPARAM)
    {
        return in.space == Space::kSHARED ? kShared : in.space == Space::kGENERIC ? kGeneric : kGlobal;
    }
    return in.opcode == Opcode::kATOM ? kAtomic : latencyOf(in);
}

//! The instructions of one run, what each must wait for, and for how long.
class Run
{
public:
    Run(std::vector<Instruction>::iterator begin, std::vector<Instruction>::iterator end)
        : mBegin{begin}
        , mCode(begin, end)
        , mEdges(mCode.size())
        , mWaitsFor(mCode.size(), 0)
    {
        connectRegisters();
        connectMemory();
    }

    void reorder()
    {
        size_t const count = mCode.size();
        std::vector<double> priority(count);
        for (size_t i = count; i-- > 0;)
        {
            priority[i] = assumedLatency(mCode[i]);
            for (Edge const& edge : mEdges[i])
            {
                priority[i] = std::max(priority[i], edge.cycles + priority[edge.to]);
            }
        }
        std::vector<double> ready(count, 0);
        std::vector<bool> isDone(count, false);
        double now = 0;
        for (size_t place = 0; place < count; ++place)
        {
            size_t best = count;
            for (size_t i = 0; i < count; ++i)
            {
                if (isDone[i] || mWaitsFor[i] != 0)
                {
                    continue;
                }
                double const own = std::max(ready[i], now);
                double const other = best == count ? own : std::max(ready[best], now);
                bool const isSooner =
                    own < other - 1e-9 || (own < other + 1e-9 && best < count && priority[i] > priority[best]);
                best = best == count || isSooner ? i : best;
            }
            isDone[best] = true;
            double const start = std::max(now, ready[best]);
            now = start + costOf(mCode[best]);
            for (Edge const& edge : mEdges[best])
            {
                --mWaitsFor[edge.to];
                ready[edge.to] = std::max(ready[edge.to], start + edge.cycles);
            }
            mBegin[static_cast<std::ptrdiff_t>(place)] = mCode[best];
        }
    }

private:
    void connect(size_t from, size_t to, double cycles)
    {
        if (from != to)
        {
            mEdges[from].push_back(Edge{to, cycles});
            ++mWaitsFor[to];
        }
    }

    void connectRegisters()
    {
        std::map<int32_t, size_t> writers;
        std::map<int32_t, std::vector<size_t>> readers;
        for (size_t i = 0; i < mCode.size(); ++i)
        {
            Instruction const& in = mCode[i];
            std::vector<int32_t> reads{in.base.slot, in.predicate};
            for (Operand const& operand : in.sources)
            {
                reads.push_back(operand.slot);
            }
            if (in.predicate >= 0) // what it does not write stays
            {
                reads.insert(reads.end(), in.targets.begin(), in.targets.end());
            }
            for (int32_t const slot : reads)
            {
                auto const writer = writers.find(slot);
                if (writer != writers.end())
                {
                    connect(writer->second, i, assumedLatency(mCode[writer->second]));
                }
                if (slot >= 0)
                {
                    readers[slot].push_back(i);
                }
            }
            for (int32_t const slot : in.targets)
            {
                auto const writer = writers.find(slot);
                if (writer != writers.end())
                {
                    connect(writer->second, i, kAfterWrite);
                }
                for (size_t const reader : readers[slot])
                {
                    connect(reader, i, kAfterRead);
                }
                readers[slot].clear();
                if (slot >= 0)
                {
                    writers[slot] = i;
                }
            }
        }
    }

    //! Loads stay after the stores before them, stores after everything.
    void connectMemory()
    {
        size_t lastStore = mCode.size();
        std::vector<size_t> loads;
        for (size_t i = 0; i < mCode.size(); ++i)
        {
            Instruction const& in = mCode[i];
            bool const isLoad = in.opcode == Opcode::kLD && in.space != Space::kPARAM;
            if (!in.isMemory() || (in.opcode == Opcode::kLD && !isLoad))
            {
                continue;
            }
            if (lastStore < mCode.size())
            {
                connect(lastStore, i, kAfterWrite);
            }
            if (isLoad)
            {
                loads.push_back(i);
                continue;
            }
            for (size_t const load : loads)
            {
                connect(load, i, kAfterRead);
            }
            loads.clear();
            lastStore = i;
        }
    }

    std::vector<Instruction>::iterator mBegin;
    std::vector<Instruction> mCode;
    std::vector<std::vector<Edge>> mEdges;
    std::vector<int32_t> mWaitsFor;
};

} // namespace

void reorder(Kernel& kernel)
{
    auto const isBorder = [](Instruction const& in)
    {
        return in.opcode == Opcode::kBRA || in.opcode == Opcode::kBAR || in.opcode == Opcode::kRET
            || in.isWarpOperation();
    };
    auto const begin = kernel.code.begin();
    size_t const count = kernel.code.size();
    for (size_t first = 0; first < count;)
    {
        size_t end = first + 1;
        while (end < count && !kernel.isTarget[end] && !isBorder(kernel.code[end]) && !isBorder(kernel.code[first]))
        {
            ++end;
        }
        Run{begin + static_cast<std::ptrdiff_t>(first), begin + static_cast<std::ptrdiff_t>(end)}.reorder();
        first = end;
    }
}

} // namespace ptx
