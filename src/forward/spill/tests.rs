use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn event(sequence: u64, payload: &[u8]) -> SpilledEvent {
    SpilledEvent {
        sequence,
        received_at_ms: 7,
        group: "g".into(),
        connection_id: "i".into(),
        req_guid: "r".into(),
        event_type: "t".into(),
        key: Some("i".into()),
        payload: payload.to_vec().into(),
        headers: Vec::new(),
        requeued: false,
    }
}

/// The payload of event number `at` of a test.
fn payload(at: u64, bytes: usize) -> Vec<u8> {
    let mut payload = vec![at as u8; bytes.max(8)];
    payload[..8].copy_from_slice(&at.to_le_bytes());
    payload
}

fn put(spill: &mut Spill, topic: &str, events: Vec<SpilledEvent>) -> u64 {
    spill.put(vec![(topic, events)]).unwrap()[0]
}

/// Everything of `topic`, in order.
fn contents(spill: &mut Spill, topic: &str) -> Vec<SpilledEvent> {
    spill.numbers(topic).map(|number| spill.event(topic, number).unwrap().clone()).collect()
}

#[test]
fn topics_are_worked_off_one_by_one_and_files_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    assert!(!path.exists(), "nothing is made before it is needed");
    spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
    let a: Vec<_> = (0..100).map(|at| event(at, &payload(at, 1000))).collect();
    let b: Vec<_> = (0..10).map(|at| event(at, &payload(at, 10))).collect();
    let firsts = spill.put(vec![("a", a.clone()), ("b", b.clone())]).unwrap();
    assert_eq!(spill.count(), 110);
    assert_eq!(contents(&mut spill, "a"), a);
    spill.consume("a", firsts[0] + 60);
    spill.save().unwrap();
    drop(spill);

    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&Undelivered::between(Sequence(1000), Sequence(1000))).unwrap();
    assert_eq!(spill.count(), 50);
    assert_eq!(contents(&mut spill, "a"), a[60..]);
    assert_eq!(contents(&mut spill, "b"), b);
    for topic in ["a", "b"] {
        spill.consume(topic, spill.numbers(topic).end);
    }
    spill.save().unwrap();
    assert_eq!((spill.count(), spill.bytes(), spill.topics().count()), (0, 0, 0));
    // Also the file that was written to last.
    let first = put(&mut spill, "a", vec![event(200, &payload(200, 10))]);
    spill.consume("a", first + 1);
    spill.save().unwrap();
    let mut left: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort_unstable();
    assert_eq!(left, ["id", "state"]);
}

#[test]
fn what_another_log_has_left_is_not_taken_out() {
    let directory = tempfile::tempdir().unwrap();
    let mut spill = Spill::open(&directory.path().join("spill")).unwrap();
    put(&mut spill, "a", (50..60).map(|at| event(at, &payload(at, 10))).collect());
    drop(spill);
    // The log was removed, and a new one begins at 1.
    let mut spill = Spill::open(&directory.path().join("spill")).unwrap();
    spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
    put(&mut spill, "a", (1..3).map(|at| event(at, &payload(at, 10))).collect());
    spill.settle(&Undelivered::between(Sequence(1), Sequence(1000))).unwrap();
    let left: Vec<u64> = contents(&mut spill, "a").iter().map(|event| event.sequence).collect();
    assert_eq!(left, (50..60).collect::<Vec<_>>());
}

#[test]
fn small_blocks_grow_together() {
    let directory = tempfile::tempdir().unwrap();
    let mut spill = Spill::open(&directory.path().join("spill")).unwrap();
    for at in 0..500 {
        put(&mut spill, "a", vec![event(at, &payload(at, 200))]);
    }
    assert!(spill.topics["a"].blocks.len() <= 5, "{}", spill.topics["a"].blocks.len());
    let wanted: Vec<_> = (0..500).map(|at| event(at, &payload(at, 200))).collect();
    assert_eq!(contents(&mut spill, "a"), wanted);
}

#[test]
fn what_is_needed_of_old_files_is_gathered() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    for round in 0..8 {
        // Too large to be written again with the next one.
        put(&mut spill, "rare", vec![event(round, &payload(round, 40_000))]);
        let first = put(&mut spill, "busy", (0..20).map(|at| event(at, &payload(at, 1 << 20))).collect());
        if round < 7 {
            spill.consume("busy", first + 20);
        }
        spill.save().unwrap();
    }
    let needed = spill.bytes();
    let disk: u64 = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(disk <= 2 * needed + SLACK_BYTES + FILE_BYTES_MAX, "{disk} for {needed}");
    assert!(!path.join(format!("{:012}", 1)).exists(), "the oldest file went");
    drop(spill);
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(contents(&mut spill, "rare").len(), 8);
    assert_eq!(contents(&mut spill, "busy").len(), 20);
}

#[test]
fn a_damaged_block_costs_its_own_events() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    // Three blocks.
    let first = put(&mut spill, "a", (0..30).map(|at| event(at, &payload(at, 30_000))).collect());
    let blocks: Vec<(u64, Block)> = spill.topics["a"].blocks.iter().map(|(first, block)| (*first, *block)).collect();
    assert!(blocks.len() >= 3);
    drop(spill);
    let file = path.join(format!("{:012}", 1));
    let mut bytes = fs::read(&file).unwrap();
    let (damaged_first, damaged) = blocks[1];
    bytes[(damaged.place.offset + damaged.bytes - 5) as usize] ^= 1;
    fs::write(&file, bytes).unwrap();
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(spill.numbers("a"), first..first + 30);
    let mut lost = 0;
    for number in spill.numbers("a") {
        match spill.event("a", number) {
            Ok(found) => assert_eq!(found.payload, payload(number - first, 30_000)),
            Err(SpillError::Damaged { end }) => {
                assert_eq!(end, damaged_first + u64::from(damaged.events));
                lost += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(lost, damaged.events);
}

#[test]
fn a_damaged_header_is_noticed_as_missing_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    put(&mut spill, "a", (0..20).map(|at| event(at, &payload(at, 30_000))).collect());
    spill.settle(&Undelivered::between(Sequence(100), Sequence(100))).unwrap();
    // In a file of its own.
    put(&mut spill, "a", (20..40).map(|at| event(at, &payload(at, 30_000))).collect());
    drop(spill);
    let file = path.join(format!("{:012}", 1));
    let mut bytes = fs::read(&file).unwrap();
    bytes[9] ^= 1;
    fs::write(&file, bytes).unwrap();
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(spill.count(), 40);
    let (lost, found): (Vec<_>, Vec<_>) = spill.numbers("a").partition(|number| spill.event("a", *number).is_err());
    assert_eq!((lost.len(), found.len()), (20, 20));
}

#[test]
fn a_state_that_is_lost_costs_duplicates_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    let first = put(&mut spill, "a", (0..20).map(|at| event(at, &payload(at, 30))).collect());
    spill.consume("a", first + 5);
    spill.save().unwrap();
    drop(spill);
    fs::write(path.join("state"), "nonsense").unwrap();
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(contents(&mut spill, "a").len(), 20);
}

/// A copy of a spill's files, as they are.
fn copy_of(path: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn a_block_torn_by_a_power_cut_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
    // Small blocks: the second put copies the first one's events, and is torn in its body. The log has its own ones still.
    put(&mut spill, "a", (0..10).map(|at| event(at, &payload(at, 100))).collect());
    put(&mut spill, "b", (10..11).map(|at| event(at, &payload(at, 100))).collect());
    put(&mut spill, "a", (20..30).map(|at| event(at, &payload(at, 100))).collect());
    let torn = spill.topics["a"].blocks[&0];
    assert_eq!(torn.events, 20);
    drop(spill);
    let file = path.join(format!("{:012}", torn.place.file));
    let mut bytes = fs::read(&file).unwrap();
    bytes[(torn.place.offset + torn.bytes - 1) as usize] ^= 1;
    fs::write(&file, bytes).unwrap();
    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&Undelivered::between(Sequence(20), Sequence(40))).unwrap();
    assert_eq!((spill.numbers("a"), spill.count()), (0..10, 11));
    assert_eq!(contents(&mut spill, "a").len(), 10);
    put(&mut spill, "a", (20..30).map(|at| event(at, &payload(at, 100))).collect());
    drop(spill);
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(contents(&mut spill, "a").len(), 20);
}

#[test]
fn no_file_goes_before_the_state_is_saved() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    put(&mut spill, "a", (0..10).map(|at| event(at, &payload(at, 100))).collect());
    put(&mut spill, "b", vec![event(10, &payload(10, 100))]);
    spill.save().unwrap();
    // The state cannot be written.
    fs::create_dir(path.join("state.new")).unwrap();
    for topic in ["a", "b"] {
        spill.consume(topic, u64::MAX);
    }
    spill.save().unwrap_err();
    let mut then = Spill::open(&path).unwrap();
    assert_eq!((contents(&mut then, "a").len(), contents(&mut then, "b").len()), (10, 1));
    fs::remove_dir(path.join("state.new")).unwrap();
    spill.save().unwrap();
    assert_eq!((Spill::open(&path).unwrap().count(), copy_of(&path).len()), (0, 2), "its id and its state");
}

/// Puts a file that takes nothing in the place of the current one.
fn fill(spill: &mut Spill) {
    let full = File::options().write(true).open("/dev/full").unwrap();
    spill.current.as_mut().unwrap().file = full;
}

#[test]
fn what_a_failed_call_wrote_is_not_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    put(&mut spill, "a", vec![event(0, &payload(0, 100))]);
    let good = fs::metadata(path.join(format!("{:012}", 1))).unwrap().len();
    // It writes some of it, and then fails.
    let begin = spill.begin();
    let mut written = Vec::new();
    let more = (1..20).map(|at| event(at, &payload(at, 30_000))).collect();
    spill.write(vec![("a", more)], &mut written).unwrap();
    spill.abandon(begin);
    assert_eq!(fs::metadata(path.join(format!("{:012}", 1))).unwrap().len(), good);
    // Others came in the meantime, or were delivered: what is put now is something else, and less.
    put(&mut spill, "a", vec![event(9, &payload(9, 100))]);
    fill(&mut spill);
    assert!(spill.put(vec![("a", vec![event(10, &payload(10, 100))])]).is_err());
    put(&mut spill, "a", vec![event(11, &payload(11, 100))]);
    let wanted = contents(&mut spill, "a");
    assert_eq!(wanted.iter().map(|event| event.sequence).collect::<Vec<_>>(), [0, 9, 11]);
    drop(spill);
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(contents(&mut spill, "a"), wanted);
}

#[test]
fn gathering_that_fails_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    let mut failed = 0;
    for round in 0..8 {
        put(&mut spill, "rare", vec![event(round, &payload(round, 40_000))]);
        let first = put(&mut spill, "busy", (0..20).map(|at| event(at, &payload(at, 1 << 20))).collect());
        if round < 4 {
            spill.consume("busy", first + 20);
        }
        // The file takes half of it, as a disk that is full, and no more.
        if round == 4 {
            spill.consume("busy", first + 20);
            let current = spill.current.as_mut().unwrap();
            (&current.file).write_all(b"half a block").unwrap();
            fill(&mut spill);
            failed += u32::from(spill.save().is_err());
            assert!(spill.current.is_none());
        }
    }
    assert!(failed > 0);
    let wanted: Vec<_> = (0..8).map(|at| event(at, &payload(at, 40_000))).collect();
    assert_eq!(contents(&mut spill, "busy").len(), 60);
    spill.save().unwrap();
    drop(spill);
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(contents(&mut spill, "rare"), wanted);
    assert_eq!(contents(&mut spill, "busy").len(), 60);
}

#[test]
fn what_is_missing_at_the_end_of_a_topic_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
    put(&mut spill, "a", (0..20).map(|at| event(at, &payload(at, 30_000))).collect());
    put(&mut spill, "b", (20..25).map(|at| event(at, &payload(at, 30_000))).collect());
    spill.save().unwrap();
    drop(spill);
    fs::remove_file(path.join(format!("{:012}", 1))).unwrap();
    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&Undelivered::between(Sequence(50), Sequence(60))).unwrap();
    assert_eq!(spill.count(), 25);
    // Something new behind what is missing, which then is worked off.
    let first = put(&mut spill, "a", vec![event(50, &payload(50, 10))]);
    assert_eq!(spill.numbers("a"), 0..21);
    for topic in ["a", "b"] {
        for number in spill.numbers(topic).filter(|number| (topic, *number) != ("a", first)) {
            assert!(matches!(spill.event(topic, number), Err(SpillError::Damaged { .. })));
        }
    }
    assert_eq!(spill.event("a", first).unwrap().sequence, 50);
    spill.consume("a", 21);
    spill.consume("b", spill.numbers("b").end);
    spill.save().unwrap();
    drop(spill);
    assert_eq!(Spill::open(&path).unwrap().count(), 0);
}

/// What becomes of the files of a stopped spill.
#[derive(Debug, Clone)]
enum Damage {
    /// A bit of a file is flipped, at so much of its length.
    Flip {
        file: usize,
        at: u32,
        bit: u8,
    },
    Truncate {
        file: usize,
        at: u32,
    },
    Remove {
        file: usize,
    },
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let damage = prop_oneof![
        4 => (any::<usize>(), any::<u32>(), 0..8u8).prop_map(|(file, at, bit)| Damage::Flip { file, at, bit }),
        1 => (any::<usize>(), any::<u32>()).prop_map(|(file, at)| Damage::Truncate { file, at }),
        1 => any::<usize>().prop_map(|file| Damage::Remove { file }),
    ];
    proptest::collection::vec(damage, 1..4)
}

impl Damage {
    fn make(&self, path: &Path) {
        let mut files: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| !file.ends_with("state") && !file.ends_with("id"));
        files.sort_unstable();
        let (Damage::Flip { file, .. } | Damage::Truncate { file, .. } | Damage::Remove { file }) = self;
        if files.is_empty() {
            return;
        }
        let file = &files[file % files.len()];
        let mut bytes = fs::read(file).unwrap();
        let place = |at: u32| ((bytes.len() as u64 * u64::from(at)) >> 32) as usize;
        match *self {
            Damage::Flip { at, bit, .. } if !bytes.is_empty() => {
                let place = place(at);
                bytes[place] ^= 1 << bit;
                fs::write(file, bytes).unwrap();
            }
            Damage::Flip { .. } => {}
            Damage::Truncate { at, .. } => fs::write(file, &bytes[..place(at)]).unwrap(),
            Damage::Remove { .. } => fs::remove_file(file).unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// What is not readable of a stopped spill is counted exactly, what is readable is as it was, in order, and a topic
    /// that is worked off to its end is empty. `lose_state`: then it may hold more again, and nothing wrong.
    #[test]
    fn damage_is_counted_exactly(
        puts in proptest::collection::vec((0..3usize, 1..20usize, 1..30_000usize), 1..12),
        consumed in proptest::collection::vec(0..40u64, 3),
        settles in proptest::collection::vec(any::<bool>(), 20),
        damages in damages(),
        lose_state in prop::bool::weighted(0.2),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spill");
        let mut spill = Spill::open(&path).unwrap();
        spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
        let mut tail = 1;
        let mut wanted: [Vec<u64>; 3] = Default::default();
        for ((topic, events, bytes), settle) in puts.into_iter().zip(settles) {
            let sequences: Vec<u64> = (tail..).take(events).collect();
            tail += events as u64;
            put(&mut spill, TOPICS[topic], sequences.iter().map(|at| event(*at, &payload(*at, bytes))).collect());
            wanted[topic].extend(sequences);
            if settle {
                // In another file; nothing is in the log any more.
                spill.settle(&Undelivered::between(Sequence(tail), Sequence(tail))).unwrap();
            }
        }
        for (topic, consumed) in consumed.into_iter().enumerate() {
            let numbers = spill.numbers(TOPICS[topic]);
            let consumed = consumed.min(numbers.end - numbers.start);
            spill.consume(TOPICS[topic], numbers.start + consumed);
            wanted[topic].drain(..consumed as usize);
        }
        spill.save().unwrap();
        drop(spill);
        damages.iter().for_each(|damage| damage.make(&path));
        if lose_state {
            fs::write(path.join("state"), b"nonsense").unwrap();
        }
        let mut spill = Spill::open(&path).unwrap();
        spill.settle(&Undelivered::between(Sequence(tail), Sequence(tail))).unwrap();
        for (topic, wanted) in wanted.iter().enumerate() {
            let (mut found, mut lost) = (Vec::new(), 0);
            for number in spill.numbers(TOPICS[topic]) {
                match spill.event(TOPICS[topic], number) {
                    Ok(event) => {
                        let len = event.payload.len();
                        prop_assert_eq!(&event.payload[..], &payload(event.sequence, len)[..]);
                        found.push(event.sequence);
                    }
                    Err(SpillError::Damaged { end }) => {
                        prop_assert!(end > number);
                        lost += 1;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            prop_assert!(found.is_sorted());
            if !lose_state {
                prop_assert!(found.iter().all(|at| wanted.contains(at)));
                prop_assert_eq!(found.len() + lost, wanted.len());
            }
            spill.consume(TOPICS[topic], u64::MAX);
        }
        prop_assert_eq!(spill.count(), 0);
        spill.save().unwrap();
        prop_assert_eq!(copy_of(&path).len(), 2);
        drop(spill);
        prop_assert_eq!(Spill::open(&path).unwrap().count(), 0);
    }
}

/// What happens to a spill.
#[derive(Debug, Clone)]
enum Step {
    /// Records of one event each are read from the log, for that topic, and spilled.
    Spill {
        topic: usize,
        events: usize,
        bytes: usize,
    },
    /// The first so many of a topic are delivered.
    Consume {
        topic: usize,
        events: u64,
    },
    Save,
    /// The log's cursor goes to its tail.
    Pass,
    /// The process ends and starts again.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..3usize, 1..20usize, 1..40_000usize).prop_map(|(topic, events, bytes)| Step::Spill { topic, events, bytes }),
        3 => (0..3usize, 1..30u64).prop_map(|(topic, events)| Step::Consume { topic, events }),
        2 => Just(Step::Save),
        2 => Just(Step::Pass),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..40)
}

const TOPICS: [&str; 3] = ["a", "b", "c"];

/// A model of one log and its spill.
#[derive(Default)]
struct Model {
    /// Sequence of the next record; its event goes to a topic.
    tail: u64,
    cursor: u64,
    /// What the spill holds, by topic.
    topics: BTreeMap<usize, Vec<u64>>,
    /// How many of the front are consumed and not saved.
    unsaved: BTreeMap<usize, Vec<u64>>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens, the spill holds what was put and not consumed, in order; after a restart perhaps also what was
    /// consumed and not saved, and never what the log shows again.
    #[test]
    fn it_holds_what_was_put(steps in steps()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spill");
        let mut spill = Spill::open(&path).unwrap();
        spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
        let mut model = Model { tail: 1, cursor: 1, ..Model::default() };
        for step in steps {
            match step {
                Step::Spill { topic, events, bytes } => {
                    let sequences: Vec<u64> = (model.tail..).take(events).collect();
                    model.tail += events as u64;
                    let events = sequences.iter().map(|at| event(*at, &payload(*at, bytes))).collect();
                    put(&mut spill, TOPICS[topic], events);
                    model.topics.entry(topic).or_default().extend(sequences);
                }
                Step::Consume { topic, events } => {
                    let numbers = spill.numbers(TOPICS[topic]);
                    let end = (numbers.start + events).min(numbers.end);
                    spill.consume(TOPICS[topic], end);
                    let consumed = model.topics.entry(topic).or_default().drain(..(end - numbers.start) as usize);
                    model.unsaved.entry(topic).or_default().extend(consumed);
                }
                Step::Save => {
                    spill.save().unwrap();
                    model.unsaved.clear();
                }
                Step::Pass => model.cursor = model.tail,
                Step::Restart => {
                    spill = Spill::open(&path).unwrap();
                    spill.settle(&Undelivered::between(Sequence(model.cursor), Sequence(model.tail))).unwrap();
                    for (topic, unsaved) in std::mem::take(&mut model.unsaved) {
                        model.topics.entry(topic).or_default().splice(..0, unsaved);
                    }
                    let cursor = model.cursor;
                    model.topics.values_mut().for_each(|events| events.retain(|sequence| *sequence < cursor));
                    // The log is read again from the cursor on; here its records get new numbers.
                    model.cursor = model.tail;
                }
            }
            let count: usize = model.topics.values().map(Vec::len).sum();
            prop_assert_eq!(spill.count(), count as u64);
            for (topic, wanted) in &model.topics {
                let found: Vec<u64> = contents(&mut spill, TOPICS[*topic]).iter().map(|event| event.sequence).collect();
                prop_assert_eq!(&found, wanted);
            }
        }
    }
}

#[test]
fn what_was_delivered_ahead_is_not_shown_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let log =
        Undelivered { ahead: Some(Sequence(50)..Sequence(60)), ..Undelivered::between(Sequence(10), Sequence(80)) };
    let settled = |spill: &mut Spill, topic: &str| {
        spill.settle(&log).unwrap();
        contents(spill, topic).iter().map(|event| event.sequence).collect::<Vec<_>>()
    };
    let put_all = |spill: &mut Spill, topic: &str, sequences: &[u64]| {
        put(spill, topic, sequences.iter().map(|at| event(*at, &payload(*at, 100))).collect())
    };
    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&Undelivered::between(Sequence(1), Sequence(1))).unwrap();
    // Of the backlog and of new records, in turns: what the cursor or the stretch has passed stays, and what is before it.
    put_all(&mut spill, "a", &[8, 9, 50, 51]);
    put_all(&mut spill, "a", &[11, 59, 12, 60, 61]);
    put_all(&mut spill, "b", &[11, 12, 60]);
    put_all(&mut spill, "c", &[55]);
    drop(spill);
    let mut spill = Spill::open(&path).unwrap();
    assert_eq!(settled(&mut spill, "a"), [8, 9, 50, 51, 11, 59]);
    assert!(settled(&mut spill, "b").is_empty());
    assert_eq!(settled(&mut spill, "c"), [55]);

    // A block that was durable, and is damaged, is counted as lost, whatever of it the log may show again.
    put_all(&mut spill, "d", &[13, 57]);
    spill.consume("c", u64::MAX);
    spill.save().unwrap();
    let damaged = spill.topics["d"].blocks.first_key_value().unwrap().1.place;
    drop(spill);
    let file = path.join(format!("{:012}", damaged.file));
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let mut spill = Spill::open(&path).unwrap();
    spill.settle(&log).unwrap();
    assert_eq!(spill.numbers("d").count(), 2);
    assert!(matches!(spill.event("d", spill.numbers("d").start), Err(SpillError::Damaged { .. })));
}
