//! \file machine.h
//! A block of threads that runs one kernel, the memory that it sees, and everything that is counted and found.
//!
//! Threads are scheduled independently, as GPUs do from Volta on: nothing but bar.sync and the warp operations makes
//! them meet.

#ifndef PTX_MACHINE_H
#define PTX_MACHINE_H

#include "instruction.h"

#include <random>
#include <unordered_map>

namespace ptx
{

//! In which order threads go on.
enum class Order : int32_t
{
    kLOCKSTEP, //!< Of a warp's lanes those go on that are furthest behind, as a GPU would.
    kRANDOM,
    kLAST_FIRST, //!< The last warp that can go on, a random group of its lanes.
    kFIRST_FIRST,
};

struct Settings
{
    Order order{Order::kLOCKSTEP};
    uint64_t seed{1};
    int32_t burst{16}; //!< Instructions that a group of lanes runs before others do; the mean.
    int32_t subset{0}; //!< Percent of the times when only some lanes of a group go on.
    bool hasTiming{false}; //!< With kLOCKSTEP only.
    bool hasChecks{true}; //!< For races and uninitialised memory; all others are always made.
    uint64_t most{0}; //!< Instructions of a block, at most; 0: any number.
};

//! Who last touched a byte of shared or a word of global memory.
struct Shadow
{
    uint32_t writeEpoch{0};
    uint32_t readEpoch{0};
    uint32_t writeBlock{0};
    uint32_t readBlock{0};
    uint16_t writer{0};
    uint16_t reader{0};
    bool isAtomic{false};
    bool isInitialised{false};
};

//! Global memory that a launch may use.
struct Allocation
{
    uint64_t base;
    uint64_t size;
    bool isReadOnly;
    std::string name;
    std::vector<Shadow> shadows; //!< Of each 4 bytes.
    std::vector<bool> sectorsRead; //!< Of 32 bytes.
    std::vector<bool> sectorsWritten;
};

struct Finding
{
    uint64_t count{0};
    std::string first;
};

//! What is counted of one instruction.
struct Counter
{
    uint64_t issues{0};
    uint64_t lanes{0};
    uint64_t requests{0};
    uint64_t wavefronts{0};
    uint64_t sectors{0};
    double stall{0};
};

//! From one barrier to the next, of one block.
struct Interval
{
    int32_t barrier; //!< The instruction that ends it, or -1.
    double cycles;
    uint64_t issues;
    uint64_t mostOfWarp;
};

struct Launch
{
    Kernel const* kernel;
    uint32_t blocks;
    uint32_t threads;
    uint64_t sharedBytes;
    uint64_t issues{0};
    uint64_t barriers{0};
    std::vector<double> blockCycles;
    std::vector<Interval> intervals;
};

//! What outlives a launch.
struct World
{
    Module module;
    Settings settings;
    std::vector<Allocation> allocations;
    std::map<std::string, Finding> findings;
    std::map<std::string, std::vector<Counter>> counters; //!< By kernel.
    std::vector<Launch> launches;
    std::string error; //!< Of the last launch that failed.
    uint32_t launchCount{0};
    uint32_t blockCount{0}; //!< Of all launches: what has a smaller number belongs to an earlier launch.
    uint32_t epoch{0};
};

enum class Access : uint8_t
{
    kREAD,
    kWRITE,
    kATOMIC,
};

//! The lanes of a warp: where each is, and what each waits for.
struct Warp
{
    uint32_t exited{0};
    uint32_t ready{0};
    uint32_t atBarrier{0};
    uint32_t atOperation{0};
    int32_t pc[kWarpSize]{}; //!< Of all lanes but those of `group`.
    uint32_t masks[kWarpSize]{}; //!< Of the warp operations that lanes wait at.
    uint32_t group{0}; //!< The lanes that run.
    int32_t groupPc{0};
    int32_t othersFirst{INT32_MAX}; //!< The smallest pc of the other ready lanes.
    double time{0};
    std::vector<double> available; //!< When each register's value is there.
    uint64_t issues{0};
    uint64_t intervalIssues{0};
};

class Block
{
public:
    Block(World& world, Kernel const& kernel, Launch& launch, uint8_t const* parameters, uint32_t index);

    //! \throw std::runtime_error threads wait for each other for ever, or run for too long.
    void run();

private:
    using Lanes = uint64_t[kWarpSize];

    void initialise();
    void setSpecial(uint32_t warp, char const* name, uint64_t first, uint64_t step);

    // schedule.cpp
    int32_t chooseWarp();
    void runGroup(uint32_t warp);
    void releaseBarrier();
    void checkBarrier(int32_t& pc);
    [[noreturn]] void failDeadlock();
    void pickFurthestBehind(Warp& warp);
    void flush(Warp& warp);
    void advance(Warp& warp);

    // execute.cpp
    void execute(uint32_t warp);
    void compute(uint32_t warp, Instruction const& in, uint32_t mask);
    void convert(Instruction const& in, uint32_t mask, uint64_t* target, uint64_t const* source);
    void load(uint32_t warp, Instruction const& in, uint32_t mask);
    void store(uint32_t warp, Instruction const& in, uint32_t mask);
    void atomic(uint32_t warp, Instruction const& in, uint32_t mask);
    void jump(uint32_t warp, Instruction const& in);
    void waitAtBarrier(uint32_t warp);
    void waitAtOperation(uint32_t warp, Instruction const& in);
    uint32_t holds(uint32_t warp, Instruction const& in, uint32_t group, char const* what);

    // operations.cpp
    void releaseOperations(uint32_t warp);
    void performOperation(uint32_t warp, uint32_t members);
    void shuffle(uint32_t warp, Instruction const& in, uint32_t lane, uint32_t members, Lanes const& values);

    // memory.cpp
    void report(std::string const& kind, int32_t pc, uint32_t thread, std::string const& detail);
    uint8_t* access(Instruction const& in, uint32_t thread, uint64_t address, int32_t bytes, Access kind);
    void checkGlobal(Allocation& allocation, uint64_t offset, int32_t bytes, uint32_t thread, Access kind);
    void checkShared(uint64_t offset, int32_t bytes, uint32_t thread, Access kind);
    Allocation* find(uint64_t address, uint64_t bytes);
    uint64_t sharedOffset(Instruction const& in, uint64_t address) const;

    // timing.cpp
    double issueTime(uint32_t warp) const;
    void countIssue(uint32_t warp);
    double memoryTime(Instruction const& in, uint32_t mask, Lanes const& addresses, int32_t bytes);
    double sharedTime(Instruction const& in, uint32_t mask, Lanes const& addresses, int32_t bytes);

    uint64_t* slot(uint32_t warp, int32_t index)
    {
        return &mRegisters[(size_t{warp} * mSlots + static_cast<size_t>(index)) * kWarpSize];
    }

    uint32_t& initialised(uint32_t warp, int32_t index)
    {
        return mInitialised[size_t{warp} * mSlots + static_cast<size_t>(index)];
    }

    //! The lanes' values of an operand; an uninitialised one among them is reported.
    uint64_t const* source(uint32_t warp, Operand const& operand, int32_t buffer, uint32_t mask);

    World& mWorld;
    Settings const& mSettings;
    Kernel const& mKernel;
    Launch& mLaunch;
    uint8_t const* mParameters;
    uint32_t mIndex;
    uint32_t mNumber; //!< Among the blocks of all launches.
    uint32_t mThreads;
    size_t mSlots;
    std::mt19937_64 mRandom;
    std::vector<Warp> mWarps;
    std::vector<uint64_t> mRegisters;
    std::vector<uint32_t> mInitialised; //!< Lanes, by warp and register.
    std::vector<uint8_t> mShared;
    std::vector<Shadow> mSharedShadows;
    std::vector<Counter>& mCounters;
    Lanes mBuffers[6]{};
    int32_t mPc{0}; //!< Of the instruction that runs.
    uint32_t mInvalid{0}; //!< Bytes of the last access that nobody has written.
    size_t mLastFound{0};
    double mNow{0}; //!< When that instruction was issued.
    double mSchedulers[4]{}; //!< When each is free again.
    double mMemoryFree{0};
    double mIntervalStart{0};
    std::unordered_map<uint64_t, double> mCache; //!< L1's sectors, and when they arrive.
};

//! Calls visit(lane) for each lane of a mask.
template <typename Visit>
inline void forLanes(uint32_t mask, Visit visit)
{
    if (mask == ~uint32_t{0})
    {
        for (uint32_t lane = 0; lane < kWarpSize; ++lane)
        {
            visit(lane);
        }
        return;
    }
    for (uint32_t left = mask; left != 0; left &= left - 1)
    {
        visit(static_cast<uint32_t>(__builtin_ctz(left)));
    }
}

// compare.cpp
bool compareFloats(Compare compare, float a, float b);
bool compareNumbers(Compare compare, Type type, uint64_t a, uint64_t b);
float smallerOf(float a, float b);
float largerOf(float a, float b);
uint64_t combined(Combine combine, Type type, uint64_t old, uint64_t value, uint64_t other);

// timing.cpp
//! Cycles of a scheduler that an instruction takes.
double costOf(Instruction const& in);
//! Cycles until an instruction's result is there.
double latencyOf(Instruction const& in);
//! Orders the instructions between jumps and barriers as a compiler for an in-order machine might.
void reorder(Kernel& kernel);

} // namespace ptx

#endif // PTX_MACHINE_H
