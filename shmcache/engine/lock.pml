/*
The protocol of the lock and of recovery as a model that `spin` checks in every order of its steps.

Three processes take the lock, change two words that are equal outside the section, and give the lock back. Death may
strike each of them between any two steps; a new process may then take the line. Comments name the code of each step.
What is claimed, in every reachable state:

    one owner       no two live processes are in the section                                  (assert, in `own`)
    no robbery      only a dead owner's lock is taken over, nobody else frees it    (assert, in `take over`, `release`)
    whole changes   whoever has entered finds the words equal and the log empty               (assert, in `enter`)
    one post each   a semaphore is not posted more often than waiters were counted            (assert, in `post`)
    no lost wake-up nobody sleeps for ever beside a free lock, even if sleeps had no end      (invalid end state)
    an end          where a sleep and the patience with a silent owner do end, all processes do  (non-progress cycle)

The claim about wake-ups needs NO_TIMEOUT and NO_CRASH: one who dies with the lock, or between counting a waiter out and
posting for it, wakes nobody. That is what the millisecond of a sleep is for. A post for nobody stays in circulation: it
makes a later waiter spin where it should sleep. `release` counts out before it posts for that reason alone; the other
way round no wake-up would be lost either.

tests/torture/lock_model.py runs the variants:

    NO_TIMEOUT      a sleep ends with a post only, and nobody gives up waiting
    NO_CRASH        nobody dies
    ALWAYS_PROBE    a waiter asks each time whether the owner lives, as it does in the end; otherwise it may or may not
    NO_SUCCESSOR    nobody takes the line of one who died
    ROUNDS, DEATHS  how often each process takes the lock, and how many die
    BUG_...         a mistake, which the claims must refute

Steps are sequentially consistent. The code sees to it where it matters: the lock word and the waiters are swapped and
read so in `Lock.wait` and `Lock.release`, and the stores of a dead process are all visible before its byte is unlocked.
*/

#define PROCESSES 3

#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifdef NO_CRASH
#define DEATHS 0
#endif
#ifndef DEATHS
#define DEATHS 2
#endif

/* Member.join: an owner id is a line of the process table and its generation; 0 is nobody. */
#define ID(line, generation) ((generation) * PROCESSES + (line) + 1)
#define LINE(id) (((id) - 1) % PROCESSES)
#define GENERATION(id) (((id) - 1) / PROCESSES)

#define X 0
#define Y 1

/* The shard header and the semaphore. */
byte lock;              /* S_LOCK */
byte waiters;           /* S_WAITERS */
byte semaphore;         /* semaphore.py */

/* What the lock guards, and the undo log. */
bit word[2];
byte used;              /* L_USED */
byte entry_word[2];     /* L_ENTRIES: where */
bit entry_old[2];       /* L_ENTRIES: what was there */

/* The process table and the kernel. */
byte generation[PROCESSES];     /* P_GENERATION */
bool byte_locked[PROCESSES];    /* the lock file: gone with the process */

/* What no process can see: the claims are about these. */
byte running[PROCESSES];        /* the id of the live process of a line, 0 for none */
bool inside[PROCESSES];         /* it has the lock */
short unposted;                 /* waiters that were counted, did not count themselves out, and were not posted for */
byte deaths;

/* The lock is ours from this step on. */
inline own() {
    assert(!inside[0] && !inside[1] && !inside[2]);
    inside[line] = true;
    lock = me;
    holder = 0
}

/* primitives.logged_store: the entry, the count, and only then the word. */
inline logged_store(index) {
#ifdef BUG_STORE_BEFORE_LOG
    d_step { old = word[index]; word[index] = new }
    d_step { entry_word[used] = index; entry_old[used] = old; old = 0 }
    used = used + 1
#else
    /* Where and what in one step: nobody reads an entry that is not counted. */
    d_step { entry_word[used] = index; entry_old[used] = word[index] }
    used = used + 1;
    word[index] = new
#endif
}

/* Lock.add_waiters. A swap that is tried until it succeeds is one step: the attempt that succeeded. */
inline count_in() {
    waiters = waiters + 1; unposted = unposted + 1; holder = 0
}

/* Sleeper.wake */
inline post() {
    atomic { assert(unposted > 0); unposted = unposted - 1; semaphore = semaphore + 1 }
}

proctype Process(byte line) {
    byte me, holder, left, round;
    bool locked;
    bit old, new;

    /* Registry._take_line: the byte first. Until the generation moves, a dead owner of the line seems to live. */
    byte_locked[line] = true;
join:
    {
        atomic {
            generation[line] = generation[line] + 1;
            me = ID(line, generation[line]);
            running[line] = me
        }

        /* Lock.acquire, and the spinning in Lock.wait: try_acquire, or see who has it. */
wait:   atomic {
            if
            :: lock == 0 -> own(); goto enter
            :: else -> holder = lock
            fi
        }
        if
#ifdef BUG_STEAL_ON_TIMEOUT
        :: true
#else
        /* Registry.is_alive: the kernel is asked before the generation is read. */
        :: locked = byte_locked[LINE(holder)];
           atomic {
               if
               :: generation[LINE(holder)] == GENERATION(holder) && (LINE(holder) == line || locked) ->
                   locked = false; goto patient
               :: else -> locked = false
               fi
           }
#endif
#ifndef ALWAYS_PROBE
        /* It has not been watched for PROBE_NS. */
        :: atomic { count_in(); goto counted }
#endif
        fi;
        /* Lock.wait: take over, compare_and_swap(holder, own id). */
        atomic {
            if
            :: lock == holder -> assert(running[LINE(holder)] != holder); own(); goto enter
            :: else
            fi
        }
patient:
        if
        :: atomic { count_in() }
#ifndef NO_TIMEOUT
        :: atomic { holder = 0; goto done }     /* LockTimeout */
#endif
        fi;

        /* Lock.wait: look again, then Sleeper.sleep. */
counted:
        if
        :: lock == 0
        :: lock != 0 ->
            if
            :: atomic { semaphore > 0 -> semaphore = semaphore - 1; goto wait }
#ifndef NO_TIMEOUT
            :: true
#endif
            fi
        fi;
        /* Lock.wait, finally: not woken, so add_waiters(-1), which stops at 0. */
        atomic {
            if
            :: waiters > 0 -> waiters = waiters - 1; unposted = unposted - 1
            :: else
            fi;
            goto wait
        }

        /* Shard.enter: is_dirty, recover_locked, Journal.roll_back. */
enter:  if
        :: used == 0
        :: used > 0 ->
            left = used;
            do
            :: left > 0 -> d_step { left = left - 1; word[entry_word[left]] = entry_old[left] }
            :: left == 0 -> break
            od;
            used = 0
        fi;
        d_step { assert(word[X] == word[Y] && used == 0); new = !word[X] }

        /* Shard.perform_locked: a transaction of two words. Journal.commit: the log's count is 0. */
        logged_store(X);
        logged_store(Y);
        d_step { used = 0; new = 0 }

        /* Lock.release */
        atomic { assert(lock == me); inside[line] = false; lock = 0 }
        if
        :: waiters == 0
        :: waiters > 0 ->
            /* Lock.wake */
#ifdef BUG_POST_BEFORE_DECREMENT
            post();
            atomic {
                if
                :: waiters > 0 -> waiters = waiters - 1
                :: else
                fi
            }
#else
            atomic {
                if
                :: waiters > 0 -> waiters = waiters - 1
                :: else -> goto done
                fi
            }
            post()
#endif
        fi;
done:   atomic {
            round = round + 1;
            if
            :: round < ROUNDS -> goto wait
            :: else -> running[line] = 0; byte_locked[line] = false     /* Member.resign */
            fi
        }
    } unless {
        /* Dead. What the process knew is gone; another one may take the line. */
        atomic {
            !byte_locked[line] ->
                me = 0; holder = 0; left = 0; locked = false; old = 0; new = 0;
                if
#ifndef NO_SUCCESSOR
                :: byte_locked[line] = true; goto join
#endif
                :: true
                fi
        }
    }
}

/* The kernel: a process ends between two of its steps, and its byte is unlocked. */
inline kill(victim) {
    byte_locked[victim] = false; running[victim] = 0; inside[victim] = false; deaths = deaths + 1
}

/* The processes differ in their numbers only: the first to die is 0, the next to die on another line is 1. */
proctype Death() {
    do
    :: atomic { deaths < DEATHS && byte_locked[0] -> kill(0) }
    :: atomic { deaths < DEATHS && deaths > 0 && byte_locked[1] -> kill(1) }
    :: atomic { deaths < DEATHS && deaths > 1 && byte_locked[2] -> kill(2) }
    :: break
    od
}

init {
    atomic {
        run Process(0);
        run Process(1);
        run Process(2);
        run Death()
    }
}
