//! A real systemd, booted on an overlay of this machine's own file system, with a network and control groups of its own.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// Exit code of `systemd-nspawn --keep-unit` after a reboot.
const REBOOT: i32 = 133;

/// A booted container. Ends with the test.
pub struct Container {
    /// `systemd-nspawn`
    nspawn: Child,
    /// Its process 1.
    leader: i32,
    work: PathBuf,
    layers: PathBuf,
    root: PathBuf,
    groups: ControlGroups,
}

impl Container {
    /// Boots, after `prepare` has changed the files of its root.
    pub fn boot(work: &Path, prepare: impl FnOnce(&Path)) -> Container {
        let (layers, root) = (work.join("layers"), work.join("root"));
        fs::create_dir_all(&layers).unwrap();
        fs::create_dir_all(&root).unwrap();
        run_here("mount", &["-t", "tmpfs", "-o", "mode=755", "ringtail-test", path(&layers)]);
        for layer in ["upper", "work"] {
            fs::create_dir(layers.join(layer)).unwrap();
        }
        let (upper, scratch) = (layers.join("upper"), layers.join("work"));
        let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), scratch.display());
        run_here("mount", &["-t", "overlay", "ringtail-test", "-o", &options, path(&root)]);
        // Without one systemd takes it for the first boot of a new machine, and asks.
        fs::write(root.join("etc/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
        // Nothing that happens to be installed here starts along.
        for wanted in ["etc/systemd/system/multi-user.target.wants", "usr/lib/systemd/system/multi-user.target.wants"] {
            if root.join(wanted).exists() {
                fs::remove_dir_all(root.join(wanted)).unwrap();
            }
        }
        prepare(&root);
        let groups = ControlGroups::make();
        let nspawn = nspawn(work, &root, &groups);
        let mut container = Container { nspawn, leader: 0, work: work.to_owned(), layers, root, groups };
        container.wait_until_up();
        container
    }

    /// Reboots: every process ends, and systemd starts from nothing on the same files.
    pub fn reboot(&mut self) {
        self.run("systemctl reboot");
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.nspawn.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the container does not shut down");
            std::thread::sleep(Duration::from_millis(50));
        };
        assert_eq!(status.code(), Some(REBOOT), "how systemd-nspawn says that it wants to be started again");
        self.leader = 0;
        self.nspawn = nspawn(&self.work, &self.root, &self.groups);
        self.wait_until_up();
    }

    fn wait_until_up(&mut self) {
        let said =
            || ["nspawn", "console"].map(|file| fs::read_to_string(self.work.join(file)).unwrap_or_default()).concat();
        let deadline = Instant::now() + PATIENCE;
        while self.leader == 0 || !self.is_up() {
            assert!(Instant::now() < deadline, "the container does not boot: {}", said());
            assert!(self.nspawn.try_wait().unwrap().is_none(), "systemd-nspawn ended: {}", said());
            let id = self.nspawn.id();
            let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
            self.leader = children.split_whitespace().next().map_or(0, |id| id.parse().unwrap());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn is_up(&self) -> bool {
        let (_, state) = self.try_run("systemctl is-system-running");
        ["running", "degraded"].contains(&state.trim())
    }

    /// Its files, seen from outside.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Runs a command inside; it must succeed. Returns what it printed.
    pub fn run(&self, command: &str) -> String {
        let (succeeded, output) = self.try_run(command);
        assert!(succeeded, "{command}: {output}");
        output
    }

    /// Runs a command inside. Whether it succeeded, and what it printed, errors last.
    pub fn try_run(&self, command: &str) -> (bool, String) {
        let mut enter = Command::new("nsenter");
        enter.args([
            "-t",
            &self.leader.to_string(),
            "-m",
            "-p",
            "-n",
            "-i",
            "-u",
            "-r",
            "-w",
            "--",
            "sh",
            "-c",
            command,
        ]);
        enter.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("DEBIAN_FRONTEND", "noninteractive");
        let output = enter.stdin(Stdio::null()).output().expect("run nsenter");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let succeeded = output.status.success();
        (succeeded, text(&output.stdout) + &if succeeded { String::new() } else { text(&output.stderr) })
    }

    /// Moves the calling thread into the container's network.
    pub fn enter_network(&self) {
        let namespace = File::open(format!("/proc/{}/ns/net", self.leader)).unwrap();
        // SAFETY: the descriptor is a network namespace; only this thread is moved.
        let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "enter the network: {}", std::io::Error::last_os_error());
    }

    /// The body of an answer over HTTP, from inside.
    pub fn get(&self, address: SocketAddr, path: &str) -> String {
        let ask = || {
            self.enter_network();
            let mut stream = TcpStream::connect(address).expect("connect to the service");
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer.split_once("\r\n\r\n").expect("a head").1.to_owned()
        };
        std::thread::scope(|scope| scope.spawn(ask).join().expect("the question is answered"))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.leader > 0 {
            // SAFETY: kill has no preconditions; the leader is a child of nspawn, which has not been waited for.
            unsafe { libc::kill(self.leader, libc::SIGRTMIN() + 4) };
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.nspawn.try_wait().is_ok_and(|status| status.is_none()) {
            if Instant::now() > deadline {
                let _ = self.nspawn.kill();
                let _ = self.nspawn.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for mount in [&self.root, &self.layers] {
            let target = CString::new(path(mount)).unwrap();
            // SAFETY: the string ends with a zero.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
        self.groups.remove();
    }
}

/// Starts systemd on the files in `root`.
fn nspawn(work: &Path, root: &Path, groups: &ControlGroups) -> Child {
    let mut nspawn = Command::new("systemd-nspawn");
    nspawn.args([
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--resolv-conf=off",
        "--timezone=off",
        "--link-journal=no",
        "--console=pipe",
        "-D",
        path(root),
        "--boot",
        "systemd.unit=multi-user.target",
    ]);
    groups.enter(&mut nspawn);
    let append = |name: &str| File::options().create(true).append(true).open(work.join(name)).unwrap();
    nspawn.stdin(Stdio::null()).stdout(append("console")).stderr(append("nspawn"));
    nspawn.spawn().expect("start systemd-nspawn")
}

/// A control group for the container in each hierarchy that systemd uses, so that two of them do not share theirs.
struct ControlGroups(Vec<PathBuf>);

impl ControlGroups {
    fn make() -> ControlGroups {
        let name = format!("ringtail-test-{}", std::process::id());
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let mut groups = Vec::new();
        for line in own.lines() {
            // `1:name=systemd:/path`, and `0::/path` of the unified hierarchy.
            let (hierarchy, path) = line.split_once(':').unwrap().1.split_once(':').unwrap();
            let mounts: &[&str] = match hierarchy {
                "name=systemd" => &["systemd"],
                "" => &["unified", ""],
                _ => continue,
            };
            let mounts = mounts.iter().map(|mount| Path::new("/sys/fs/cgroup").join(mount));
            let parent = mounts.map(|mount| mount.join(path.trim_start_matches('/')));
            let Some(parent) = parent.into_iter().find(|parent| parent.join("cgroup.procs").exists()) else { continue };
            let group = parent.join(&name);
            fs::create_dir(&group).unwrap_or_else(|error| panic!("{}: {error}", group.display()));
            groups.push(group);
        }
        ControlGroups(groups)
    }

    /// The command's process begins in them.
    fn enter(&self, command: &mut Command) {
        let open = |group: &PathBuf| File::options().write(true).open(group.join("cgroup.procs")).unwrap();
        let mut members: Vec<File> = self.0.iter().map(open).collect();
        // SAFETY: between fork and exec it does nothing but write to open files.
        unsafe { command.pre_exec(move || members.iter_mut().try_for_each(|members| members.write_all(b"0"))) };
    }

    /// Removes them, and what the container left in them.
    fn remove(&self) {
        for group in &self.0 {
            remove_group(group);
        }
    }
}

fn remove_group(group: &Path) {
    let children = fs::read_dir(group).into_iter().flatten().flatten();
    children.filter(|child| child.path().is_dir()).for_each(|child| remove_group(&child.path()));
    let _ = fs::remove_dir(group);
}

fn path(path: &Path) -> &str {
    path.to_str().expect("the path is UTF-8")
}

fn run_here(command: &str, arguments: &[&str]) {
    let output = Command::new(command).args(arguments).output().expect("run the command");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}
