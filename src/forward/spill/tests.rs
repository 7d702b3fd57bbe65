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
    spill.numbers(topic).map(|number| spill.event(topic, number).unwrap()).collect()
}

#[test]
fn topics_are_worked_off_one_by_one_and_files_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spill");
    let mut spill = Spill::open(&path).unwrap();
    assert!(!path.exists(), "nothing is made before it is needed");
    spill.settle(Sequence(1), Sequence(1)).unwrap();
    let a: Vec<_> = (0..100).map(|at| event(at, &payload(at, 1000))).collect();
    let b: Vec<_> = (0..10).map(|at| event(at, &payload(at, 10))).collect();
    let firsts = spill.put(vec![("a", a.clone()), ("b", b.clone())]).unwrap();
    assert_eq!(spill.count(), 110);
    assert_eq!(contents(&mut spill, "a"), a);
    spill.consume("a", firsts[0] + 60);
    spill.save().unwrap();
    drop(spill);

    let mut spill = Spill::open(&path).unwrap();
    spill.settle(Sequence(1000), Sequence(1000)).unwrap();
    assert_eq!(spill.count(), 50);
    assert_eq!(contents(&mut spill, "a"), a[60..]);
    assert_eq!(contents(&mut spill, "b"), b);
    for topic in ["a", "b"] {
        spill.consume(topic, spill.numbers(topic).end);
    }
    spill.save().unwrap();
    assert_eq!((spill.count(), spill.bytes(), spill.topics().count()), (0, 0, 0));
    let left: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["state"]);
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
    put(&mut spill, "rare", (0..3).map(|at| event(at, &payload(at, 10))).collect());
    for round in 0..8 {
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
    assert_eq!(contents(&mut spill, "rare").len(), 3);
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
    spill.settle(Sequence(100), Sequence(100)).unwrap();
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
        spill.settle(Sequence(1), Sequence(1)).unwrap();
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
                    spill.settle(Sequence(model.cursor), Sequence(model.tail)).unwrap();
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
